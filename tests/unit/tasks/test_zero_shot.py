"""Zero-shot tasks: what is asked of lm-evaluation-harness and what is made of its answer. The harness itself is an
extra, so that a stub with its interface stands in for it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import at_work
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import perplexity, zero_shot
from prunelab.common.metrics import uncertainty

SUITE = {"tasks": ["boolq", "piqa"], "average": ["boolq acc", "piqa acc_norm"], "shots": 0}
STORIES = {"loader": "stories", "folder": "lm", "file": "stories.json"}
RESULTS = {  # as the harness gives them: a name of the task among metrics, errors that may be text
    "boolq": {"alias": "boolq", "acc,none": 0.75, "acc_stderr,none": 0.01},
    "piqa": {"acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 0.625, "acc_norm_stderr,none": 0.02},
    "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.012},
    "longbench_trec": {"classification_score,none": 0.5, "classification_score_stderr,none": 0.05},
    "cnn_dailymail_abisee": {"rouge1,none": 0.4012, "bertscore_f1,none": 0.8},
    "wikitext": {"word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A"},
}


class HFLM:
    """The parts of the harness's wrapper that are used; it takes no others (lm_eval 0.4.13, models/huggingface.py)."""

    def __init__(self, pretrained, backend="default", tokenizer=None, device="cuda", batch_size=1, softmax_dtype=None):
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size
        self.softmax_dtype = softmax_dtype


@pytest.fixture
def harness(monkeypatch):
    """What the harness was asked, call by call."""
    calls = []

    def simple_evaluate(
        model, model_args=None, tasks=None, num_fewshot=None, batch_size=None, max_batch_size=None, device=None,
        use_cache=None, limit=None, bootstrap_iters=100000, check_integrity=False, write_out=False, log_samples=True,
        task_manager=None,
    ):  # fmt: skip
        calls.append({"model": model, "tasks": tasks, "num_fewshot": num_fewshot, "limit": limit})
        calls[-1]["at work"] = [method.name for method in at_work(model.model)]
        return {"results": RESULTS, "configs": {}}

    stub, wrappers, wrapper = (ModuleType(f"lm_eval{part}") for part in ("", ".models", ".models.huggingface"))
    stub.simple_evaluate, stub.__version__, wrapper.HFLM = simple_evaluate, "0.4.13", HFLM
    for module in (stub, wrappers, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(zero_shot, "known_tasks", lambda: None)
    return calls


def test_tasks_are_told_where_their_data_lie(monkeypatch, tmp_path):
    place = tmp_path / "cais" / "mmlu"
    place.mkdir(parents=True)
    monkeypatch.setattr(zero_shot, "changed", lambda task, given: (task, given))
    data = {"data of mmlu": {"hub": "cais/mmlu", "tasks": ["mmlu", "piqa"], "local": "0"}}
    found = zero_shot.located(["mmlu", "piqa", "rte"], data, {"hub": str(tmp_path)})
    told = {"dataset_path": str(place)}
    assert found == [("mmlu", {"mmlu": told}), ("piqa", {"piqa": told}), "rte"]


def test_tasks_of_a_group_are_told_each_where_its_data_lie(monkeypatch, tmp_path):
    monkeypatch.setattr(zero_shot, "changed", lambda task, given: (task, given))
    data = {}
    for part in ("x_en", "x_math"):
        (tmp_path / "hails" / part).mkdir(parents=True)
        data[f"data of {part}"] = {"hub": f"hails/{part}", "tasks": [part], "group": "all", "local": "0"}
    en, mathematics = ({"dataset_path": str(tmp_path / "hails" / part)} for part in ("x_en", "x_math"))
    found = zero_shot.located(["all", "x_math"], data, {"hub": str(tmp_path)})
    assert found == [("all", {"x_en": en, "x_math": mathematics}), ("x_math", {"x_math": mathematics})]


@pytest.fixture
def tiny(monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    monkeypatch.setattr(zero_shot.loading, "language", lambda identity, config, like=None: (model, "tokenizer"))
    drawn = [torch.randint(64, (6,)) for _ in range(3)]
    monkeypatch.setattr(perplexity.texts, "windows", lambda *arguments: drawn)
    return model


def run(method=None, budget=None, **settings):
    ids = {"model": {"hub": "some/where"}, "calibration": STORIES}
    return Run("zero_shot", "paper", method, {}, budget, {**SUITE, "length": 6, "calibration": 3, **settings}, ids)


def test_accuracies_come_back_as_percent_with_their_average(harness, tiny):
    found = runner.measure(run(), {})
    assert found["boolq acc"]["value"] == 75 and found["boolq acc"]["stderr"] == 1
    assert found["piqa acc_norm"]["value"] == 62.5 and "stderr" not in found["piqa acc"]
    assert found["gsm8k exact_match,strict-match"]["value"] == 25
    assert found["longbench_trec classification_score"]["value"] == 50
    assert found["cnn_dailymail_abisee rouge1"]["value"] == 0.4012 and "cnn_dailymail_abisee bertscore_f1" not in found
    assert found["average"]["value"] == 68.75
    assert not any("perplexity" in name or "alias" in name for name in found)
    assert all(found[name]["protocol"] == "lm-evaluation-harness 0.4.13" for name in ("boolq acc", "average"))
    (call,) = harness
    assert call["tasks"] == ["boolq", "piqa"] and call["num_fewshot"] == 0 and call["limit"] is None
    assert call["model"].model is tiny and call["model"].tokenizer == "tokenizer"


def test_questions_of_a_part_pair_up_in_their_order_and_are_behind_the_average(harness, tiny, monkeypatch):
    """A few questions are noted one by one, so that boards may take differences over the same ones."""
    asked = sys.modules["lm_eval"].simple_evaluate

    def noted(*, log_samples, **given):
        right = {"boolq": (1, 1, 0, 1), "piqa": (1, 0, 1, 0)}
        rows = {
            task: [{"doc_id": i, "filter": "none", "acc": float(v), "acc_norm": 0.625} for i, v in enumerate(values)][
                ::-1
            ]
            for task, values in right.items()
        }
        results = {
            "boolq": {"acc,none": 0.75},
            "piqa": {"acc,none": 0.5, "acc_norm,none": 0.625, "acc_norm_stderr,none": 0.1},
        }
        return {**asked(**given), "results": results, **({"samples": rows} if log_samples else {})}

    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", noted)
    found = runner.measure(run(limit=4, average=["boolq acc", "piqa acc"]), {})
    assert found["boolq acc"]["samples"] == [100, 100, 0, 100] and found["piqa acc"]["n"] == 4
    assert found["average"]["samples"] == [100, 100, 0, 100, 100, 0, 100, 0] and found["average"]["value"] == 62.5
    assert found["average"]["stderr"] == pytest.approx(18.298, abs=1e-3)
    gap = uncertainty.paired_difference(found["average"], {**found["average"], "samples": [0.0] * 8})
    assert gap is not None and gap[0] == 62.5
    whole = runner.measure(run(average=["boolq acc", "piqa acc"]), {})
    assert whole["average"]["value"] == 62.5 and "samples" not in whole["average"] | whole["boolq acc"]


def test_a_model_is_pruned_in_its_own_precision_and_asked_in_another(harness, tiny, monkeypatch):
    pruned, prune = [], perplexity.prune

    def noting(*arguments):
        result = prune(*arguments)
        pruned.append(next(tiny.parameters()).dtype)
        return result

    monkeypatch.setattr(perplexity, "prune", noting)
    found = runner.measure(run("wanda", "0.5", dtype="bfloat16"), {})
    assert pruned == [torch.float32] and {p.dtype for p in tiny.parameters()} == {torch.bfloat16}
    (call,) = harness
    assert call["model"].softmax_dtype == "float32" and found["sparsity"]["value"] == pytest.approx(50, abs=1)
    assert found["average"]["protocol"].startswith("lm-evaluation-harness 0.4.13; bfloat16; ")
    with pytest.raises(PrunelabError, match="dtype"):
        runner.measure(run(dtype="int8"), {})


def test_tasks_with_other_worked_examples_are_asked_by_themselves(harness, tiny):
    found = runner.measure(run(shots_of={"piqa": 5}, against=68.75), {})
    assert found["relative"]["value"] == 100
    assert [(call["tasks"], call["num_fewshot"]) for call in harness] == [(["boolq"], 0), (["piqa"], 5)]
    assert harness[0]["model"] is harness[1]["model"] and found["average"]["value"] == 68.75
    with pytest.raises(PrunelabError, match="names mmlu"):
        runner.measure(run(shots_of={"mmlu": 5}), {})


def test_the_harness_gets_the_pruned_model(harness, tiny):
    before = sum(int(p.count_nonzero()) for p in tiny.parameters())
    found = runner.measure(run("wanda", "0.5"), {})
    assert sum(int(p.count_nonzero()) for p in harness[0]["model"].model.parameters()) < before
    assert found["sparsity"]["value"] == pytest.approx(50)
    assert found["boolq acc"]["protocol"].endswith("calibrated on 3 of 6 tokens (stories)")


def test_caches_and_tokens_are_pruned_while_the_harness_asks(harness, tiny):
    runner.measure(run("snapkv", "0.5"), {})
    runner.measure(run(), {})
    assert [call["at work"] for call in harness] == [["snapkv"], []]
    assert not at_work(tiny)
    with pytest.raises(PrunelabError, match="lexrank ranks no words"):
        runner.measure(run("lexrank", "0.5"), {})


def test_a_metric_that_the_harness_lacks_is_named(harness, tiny):
    with pytest.raises(PrunelabError, match="gave no arc_easy acc"):
        runner.measure(run(average=["arc_easy acc"]), {})


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PrunelabError, match=r"\[evaluation\]"):
        runner.measure(run(), {})


class Request:
    """What the harness asks, as far as it is read."""

    def __init__(self, doc):
        self.doc, self.task_name, self.arguments = (
            doc,
            "longbench_x",
            (f"Read. {doc.get('context')} Ask.", {"until": []}),
        )

    @property
    def args(self):
        return self.arguments


class Words:
    """A tokenizer of letters."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % 62 + 2 for letter in text]}

    def decode(self, ids):
        return chr(ids[0] + 60)


def test_contexts_of_prompts_are_shortened_and_nothing_else(tiny):
    from prunelab.common.measures import shortened
    from prunelab.common.measures.bench import Bench

    bench = Bench("paper", {}, None, {}, "selective_context", {"level": "token"}, "0.5")
    asked = []

    class Wrapper:
        def generate_until(self, requests):
            asked.extend(request.args for request in requests)
            return ["answer" for _ in requests]

    evaluated, given = Wrapper(), Request({"context": "abcdefghijklmnopqrstuvwxyz" * 30})
    shortened.ask_shortened(evaluated, shortened.contexts(bench, tiny, Words()))
    assert evaluated.generate_until([given]) == ["answer"]
    ((prompt, kwargs),) = asked
    assert prompt.startswith("Read. ") and prompt.endswith(" Ask.") and kwargs == {"until": []}
    assert len(prompt) - len("Read.  Ask.") == pytest.approx(390, abs=10), "half of the letters, ties apart"
    assert given.args[0].count("abc") == 30, "the request itself stays as it is"
    with pytest.raises(PrunelabError, match="no context apart"):
        evaluated.generate_until([Request({"question": "x"})])


def test_a_prompt_of_random_tokens_is_read_and_shortened_anew_each_time(tiny):
    from prunelab.common.measures import shortened
    from prunelab.common.measures.bench import Bench

    bench = Bench("paper", {}, None, {}, "selective_context", {"level": "token"}, "0.25")
    ids = torch.randint(3, 64, (1, 120))
    made = shortened.prompt(bench, tiny, {"input_ids": ids})()
    left = made["input_ids"][0].tolist()
    assert len(left) == pytest.approx(30, abs=2) and made["attention_mask"].shape == (1, len(left))
    rest = iter(ids[0].tolist())
    assert all(token in rest for token in left), "in their order"
