"""Fine-tuning on instructions: what of them enters the loss, what a selector leaves, and that scores are of what was
trained. lm-evaluation-harness is an extra, and is asked in `test_language_harness.py`."""

from __future__ import annotations

import json

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import instructions
from prunelab.common.measures import zero_shot
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


def test_what_a_selector_leaves_of_batches_and_of_the_data_set_is_told(folder, asked):
    each = run(folder, "q_tuning", "0.5,0.5", epochs=2)
    assert each["samples"]["value"] == 50 and each["tokens"]["value"] <= 50
    once = run(folder, "q_tuning", "1,1", epochs=1)
    assert once["samples"]["value"] == 100
    with pytest.raises(PrunelabError, match="second model"):
        run(folder, "rho1", "0.5")


def test_low_rank_adapters_are_merged(folder, asked):
    pytest.importorskip("peft")
    run(folder, epochs=1, rank=2)
    assert not any("lora" in name for name, _ in asked[0].named_parameters())
