"""Fine-tuning on instructions: what of them enters the loss, what a selector leaves, and that scores are of what was
trained. lm-evaluation-harness is an extra, and is asked in `test_language_harness.py`."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import instructions
from prunelab.common.data_selection import grades
from prunelab.common.measures import finetune, perplexity, task_examples, zero_shot
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.tasks import get
from tests.contract.references import language_model

WORDS = ["<s>", "###", "user", "assistant", "system", *(f"w{i}" for i in range(40))]
ROWS = [{"instruction": f"w{i} w{i + 1}", "output": "w30 w31 w32"} for i in range(12)]
IDS = {
    "model": {"testbed": "tiny"},
    "data": {"loader": "instructions", "hub": "some/rows", "file": "rows.json", "local": "0"},
}


class Tokenizer:
    eos_token_id = 0
    chat_template = None

    def __call__(self, text, verbose=True, add_special_tokens=True):
        return {"input_ids": [WORDS.index(word) for word in text.split()]}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "some" / "rows"
    place.mkdir(parents=True)
    (place / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """The models whose scores were taken; a score is the likelihood of an answer."""
    models = []

    def scored(bench, model, tokenizer, besides="", batch=None):
        models.append(model)
        ids = torch.tensor([[WORDS.index(word) for word in ["w30", "w31", "w32"]]])
        with torch.no_grad():
            return {"answers acc": {"value": -float(model(input_ids=ids, labels=ids).loss)}}

    monkeypatch.setattr(zero_shot, "harness", lambda: None)
    monkeypatch.setattr(zero_shot, "scored", scored)
    monkeypatch.setattr(loading, "language", lambda identity, config: (language_model(), Tokenizer()))
    return models


def run(folder, method=None, budget=None, options=None, **settings):
    task = get("finetune")
    given = {"tasks": ("answers",), "batch": 4, "rate": 3e-3, "rank": 0, **settings}
    return task().measure(Bench("paper", IDS, task.read(given), {"hub": str(folder)}, method, options or {}, budget))


def load(folder, length=64):
    return instructions.load(IDS["data"], {"hub": str(folder)}, Tokenizer(), length)


def test_the_answer_and_its_end_alone_enter_the_loss(folder):
    piece = load(folder)[0]
    prompt = [WORDS.index(word) for word in ["###", "user", "w0", "w1", "###", "assistant"]]
    answer = [WORDS.index(word) for word in ("w30", "w31", "w32", "<s>")]
    assert piece.tokens.tolist() == prompt + answer
    assert piece.labels.tolist() == [instructions.IGNORED] * len(prompt) + answer


def test_of_a_conversation_the_last_answer_is_learned(folder):
    turns = [("system", "w0"), ("human", "w1"), ("gpt", "w2"), ("human", "w3"), ("gpt", "w4")]
    rows = [{"conversations": [{"from": who, "value": said} for who, said in turns]}]
    (folder / "some" / "rows" / "rows.json").write_text(json.dumps(rows))
    (piece,) = load(folder)
    assert [WORDS[i] for i in piece.labels[piece.labels >= 0].tolist()] == ["w4", "<s>"]
    assert [WORDS[i] for i in piece.tokens.tolist()][:3] == ["###", "system", "w0"]


def test_messages_are_conversations(folder):
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4")]
    rows = [{"messages": [{"role": who, "content": said} for who, said in turns]}]
    (folder / "some" / "rows" / "rows.json").write_text(json.dumps(rows))
    (piece,) = load(folder)
    assert [WORDS[i] for i in piece.labels[piece.labels >= 0].tolist()] == ["w4", "<s>"]


def test_what_is_too_long_is_cut_off_and_a_prompt_that_fills_the_length_is_left_out(folder):
    assert len(load(folder, 8)[0].tokens) == 8
    with pytest.raises(PrunelabError, match="allow more"):
        load(folder, 6)
    (folder / "some" / "rows" / "rows.json").write_text(json.dumps([{"question": "w0"}]))
    with pytest.raises(PrunelabError, match="no list of instructions"):
        load(folder)


def test_scores_are_of_the_model_that_was_trained(folder, asked):
    before = run(folder, epochs=0)["answers acc"]["value"]
    assert run(folder, epochs=3)["answers acc"]["value"] > before
    assert all(not model.training for model in asked)


def test_a_gain_is_over_the_mean_that_another_training_reached(folder, asked, monkeypatch):
    monkeypatch.setattr(
        zero_shot,
        "scored",
        lambda *given, **more: {"average": {"value": 52.5, "stderr": 0.4, "protocol": "nine tasks"}},
    )
    result = run(folder, epochs=0, against=50.0)
    assert result["gain"] == {"value": 5.0, "stderr": 0.8, "protocol": "nine tasks"}
    assert "gain" not in run(folder, epochs=0)


def test_what_a_selector_leaves_of_batches_and_of_the_data_set_is_told(folder, asked):
    each = run(folder, "q_tuning", "0.5,0.5", epochs=2)
    assert each["samples"]["value"] == 50 and each["tokens"]["value"] <= 50
    once = run(folder, "q_tuning", "1,1", epochs=1)
    assert once["samples"]["value"] == 100


@pytest.mark.parametrize("tokens", ["fastv", "sparsevlm", "rho1", "token_cleaning"])
@pytest.mark.parametrize("rank", [0, 2])
def test_tokens_are_chosen_inside_a_training_by_whatever_the_rule_reads(folder, asked, tokens, rank):
    if rank:
        pytest.importorskip("peft")
    options = {"tokens": tokens, "samples": "infobatch"}
    found = run(folder, "samples_and_tokens", "0.5,0.5", options, epochs=2, reference=6, rank=rank)
    assert found["samples"]["value"] == 50 and 0 < found["tokens"]["value"] < 50


@pytest.mark.parametrize("method", ["rho1", "rho1_static", "sstoken"])
def test_tokens_alone_are_chosen_before_the_training_or_in_it(folder, asked, method):
    found = run(folder, method, "0.5", epochs=2, reference=6)
    assert found["samples"]["value"] == 100 and 0 < found["tokens"]["value"] < 100


@pytest.mark.parametrize("rule", ["alpagasus", "deita", "ds2"])
def test_instructions_are_chosen_by_the_grades_of_other_models(folder, asked, monkeypatch, rule):
    graders = {"grader": {"testbed": "one"}, "second_grader": {"testbed": "two"}}
    needed = graders if rule == "deita" else {"grader": graders["grader"]}
    monkeypatch.setattr(grades, "GRADINGS", {k: grades.Grading("{question} {answer}", (3, 4)) for k in grades.GRADINGS})
    monkeypatch.setattr(grades, "_one", lambda tokenizer, word: int(word))
    with pytest.raises(PrunelabError, match="name a model under the setting 'grader'"):
        run(folder, "graded_samples", "0.5,1", {"rule": rule}, epochs=1)
    for name, identity in needed.items():
        monkeypatch.setitem(IDS, name, identity)
    found = run(folder, "graded_samples", "0.5,0.5", {"rule": rule, "near": 3}, epochs=1)
    assert found["samples"]["value"] == 50 and 0 < found["tokens"]["value"] < 50


@pytest.mark.parametrize("rank", [0, 2])
def test_instructions_are_chosen_by_their_influence_on_examples_of_the_tasks(folder, asked, monkeypatch, rank):
    if rank:
        pytest.importorskip("peft")
    with pytest.raises(PrunelabError, match="setting 'target'"):
        run(folder, "less_and_tokens", "0.5,0.5", epochs=1)

    class Questions:
        config = SimpleNamespace(doc_to_choice=["w30", "w31"], target_delimiter=" ")

        def has_training_docs(self):
            return True

        def training_docs(self):
            return [{"asked": f"w{i} w{i + 1}", "right": i % 2} for i in range(6)]

        def doc_to_text(self, row):
            return row["asked"]

        def doc_to_target(self, row):
            return row["right"]

        def doc_to_choice(self, row):
            return self.config.doc_to_choice

    class Untaught(Questions):
        def has_training_docs(self):
            return False

    tasks = ModuleType("lm_eval.tasks")
    tasks.get_task_dict = lambda names: {"group": {"answers": Questions()}, "more": Untaught()}
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    options = {"dimensions": 64, "warm_share": 0.5, "warm_epochs": 2}
    found = run(folder, "less_and_tokens", "0.5,0.5", options, epochs=1, target=3, rank=rank)
    assert found["samples"]["value"] == 50 and 0 < found["tokens"]["value"] < 50
    asking = SimpleNamespace(settings=SimpleNamespace(tasks=("answers",)), ids={}, config={}, seed=0)
    pieces = task_examples.examples(asking, Tokenizer(), 3, 64)
    assert list(pieces) == ["answers"] and len(pieces["answers"]) == 3
    first = pieces["answers"][0]
    assert first.labels.tolist()[:2] == [-100, -100] and WORDS[int(first.labels[2])] == first.text
    tasks.get_task_dict = lambda names: {"more": Untaught()}
    with pytest.raises(PrunelabError, match="none of the tasks has a training split"):
        task_examples.examples(asking, Tokenizer(), 3, 64)


def test_a_reference_model_is_trained_where_a_rule_asks_for_it_alone(folder, asked, monkeypatch):
    trained = []
    own = finetune._trained
    monkeypatch.setattr(finetune, "_trained", lambda b, m, s: (trained.append(len(s)), own(b, m, s))[1])
    run(folder, "q_tuning", "0.5,0.5", {"tokens": "excess"}, epochs=1, reference=5)
    run(folder, "q_tuning", "0.5,0.5", epochs=1, reference=5)
    assert trained == [5, 12, 12]
    with pytest.raises(PrunelabError, match="setting 'reference'"):
        run(folder, "rho1", "0.5")


def test_low_rank_adapters_are_merged(folder, asked):
    pytest.importorskip("peft")
    run(folder, epochs=1, rank=2)
    assert not any("lora" in name for name, _ in asked[0].named_parameters())


def test_weights_are_pruned_before_the_training_or_after_it_or_while_it_lasts(folder, asked, monkeypatch):
    """What was removed stays away, and the training makes up for some of it; behind the training it cannot."""
    monkeypatch.setattr(perplexity.texts, "windows", lambda *arguments: [torch.arange(5, 21) for _ in range(4)])
    monkeypatch.setitem(IDS, "calibration", {"loader": "stories"})
    tuned = {}
    for order in ("prune, train", "train, prune"):
        found = run(folder, "llm_pruner", "0.5", epochs=3, order=order, calibration=4, calibration_length=16)
        assert found["saving"]["value"] > 5
        tuned[order] = found["answers acc"]["value"]
    assert tuned["prune, train"] > tuned["train, prune"]
    trained = run(folder, "loraprune", "0.5", {"every": 1}, epochs=3, together=2)
    assert trained["saving"]["value"] > 5
    assert run(folder, "pat", "0.75", epochs=4)["saving"]["value"] > 5
    assert run(folder, "vtrans", "0.75", epochs=3)["answers acc"]["value"] < 0  # with the model as it was for a teacher
    rounded = run(folder, "loraprune", "0.5", {"every": 1}, epochs=3, together=2, base_bits=8)
    assert rounded["saving"] == trained["saving"] and rounded["answers acc"] != trained["answers acc"]
    with pytest.raises(PrunelabError, match="plain training has no factors above weights of eight bits"):
        run(folder, base_bits=8)
    with pytest.raises(PrunelabError, match="0 epochs"):
        run(folder, "loraprune", "0.5", epochs=0)


def test_pruned_models_take_low_rank_adapters(folder, asked, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(perplexity.texts, "windows", lambda *arguments: [torch.arange(5, 21) for _ in range(4)])
    monkeypatch.setitem(IDS, "calibration", {"loader": "stories"})
    for method in ("llm_pruner", "slicegpt", "wanda_sp"):
        found = run(folder, method, "0.5", epochs=1, rank=2, dropout=0.05, calibration=4, calibration_length=16)
        assert found["saving"]["value"] > 5


def test_perplexity_is_of_the_text_and_needs_no_task(folder, asked, monkeypatch):
    made = {"one": torch.tensor([5, 6, 35, 36, 37]), "other": torch.arange(20, 30)}
    monkeypatch.setattr(finetune.texts, "sequences", lambda identity, *more: [made[identity["loader"]]])
    monkeypatch.setitem(IDS, "text", {"loader": "one"})
    monkeypatch.setitem(IDS, "second_text", {"loader": "other"})
    before, after = (run(folder, epochs=epochs, tasks=()) for epochs in (0, 3))
    assert after["perplexity"]["value"] < before["perplexity"]["value"] and not asked
    assert after["second_perplexity"]["value"] > after["perplexity"]["value"]


def test_a_batch_in_parts_takes_as_many_steps(folder, asked):
    whole, parts = (run(folder, epochs=2, batch=4, together=n)["answers acc"]["value"] for n in (None, 2))
    assert parts == pytest.approx(whole, abs=0.5)
    with pytest.raises(PrunelabError, match="does not divide"):
        run(folder, batch=4, together=3)


def test_instructions_of_parquet_files_are_those_of_json(folder, monkeypatch):
    """pyarrow is no requirement; a stub with what is used of it stands in."""
    place = folder / "some" / "rows"
    expected = [piece.tokens.tolist() for piece in load(folder)]
    rows = [{"instruction": row["instruction"], "response": row["output"]} for row in ROWS]
    (place / "rows.json").unlink()
    whole = {key: value for key, value in IDS["data"].items() if key != "file"}
    with pytest.raises(PrunelabError, match="no Parquet"):
        instructions.load(whole, {"hub": str(folder)}, Tokenizer(), 64)
    for name, part in (("a", rows[:5]), ("b", rows[5:])):
        (place / f"{name}.parquet").write_text(json.dumps(part))
    reads = ModuleType("pyarrow.parquet")
    reads.read_table = lambda path: SimpleNamespace(to_pylist=lambda: json.loads(path.read_text()))
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", reads)
    pieces = instructions.load(whole, {"hub": str(folder)}, Tokenizer(), 64)
    assert [piece.tokens.tolist() for piece in pieces] == expected


def test_tied_embeddings_are_made_two_for_methods_that_change_one(folder, asked, monkeypatch):
    monkeypatch.setattr(
        loading, "language", lambda identity, config: (language_model(tie_word_embeddings=True), Tokenizer())
    )
    with pytest.raises(PrunelabError, match="tied"):
        run(folder, "pat", "0.75", epochs=2)
    assert run(folder, "pat", "0.75", epochs=2, untie=True)["saving"]["value"] > 5
    assert run(folder, "pat", "1", {"rank": 4}, epochs=2, untie=True)["saving"]["value"] == 0


@pytest.mark.parametrize("method", [None, "llm_pruner", "pat", "loraprune", "vtrans", "pst"])
def test_half_precision_trains_in_bfloat16(folder, asked, monkeypatch, method):
    monkeypatch.setattr(loading, "language", lambda identity, config: (language_model().half(), Tokenizer()))
    monkeypatch.setattr(perplexity.texts, "windows", lambda *arguments: [torch.arange(5, 21) for _ in range(4)])
    monkeypatch.setitem(IDS, "calibration", {"loader": "stories"})
    more = {"calibration": 4, "calibration_length": 16, "rank": 0 if method is None else 2}
    run(folder, method, method and "0.75", epochs=2, **more)
    assert asked[0].dtype == torch.bfloat16
    assert all(bool(parameter.isfinite().all()) for parameter in asked[0].parameters())
