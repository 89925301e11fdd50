"""Fine-tuning under data selectors: the corpus, what enters the training, and what a run gives."""

from __future__ import annotations

import pytest

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import tuning
from prunelab.common.measures import tune as measured
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.tasks import get
from tests.contract.references import language_model

WORDS = [f"w{i}" for i in range(60)]
IDS = {"model": {"testbed": "tiny"}, "data": {"loader": "words", "of": "a"}, "among": {"loader": "words", "of": "b"}}


class Tokenizer:
    def __call__(self, text, verbose=True):
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids.tolist())


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """Two languages of 30 words each, which follow each other in a circle."""

    def load(identity, config, split="test"):
        low, first = 30 * (identity["of"] == "b"), len(split)
        return tuple(" ".join(WORDS[low + (first + 7 * d + i) % 30] for i in range(90)) for d in range(12))

    monkeypatch.setattr(tuning.texts, "load", load)
    monkeypatch.setattr(measured, "_REFERENCES", {})
    monkeypatch.setattr(loading, "language", lambda identity, config: (language_model(), Tokenizer()))


def run(method=None, budget=None, options=None, **settings):
    task = get("tune")
    given = {"length": 16, "samples": 16, "clean": 4, "held_out": 6, "steps": 4, "batch": 4, **settings}
    return task().measure(Bench("testbed", IDS, task.read(given), {}, method, options or {}, budget))


def test_half_of_the_samples_are_of_another_text():
    corpus = tuning.load(
        IDS["data"], IDS["among"], {}, Tokenizer(), length=16, samples=16, prompt=0.25, clean=4, held_out=6
    )
    assert (len(corpus.samples), len(corpus.clean), len(corpus.held_out)) == (16, 4, 6)
    assert sum(int(piece.tokens[0]) >= 30 for piece in corpus.samples) == 8
    assert all(int(piece.tokens[0]) < 30 for piece in (*corpus.clean, *corpus.held_out))
    assert all((piece.labels == -100).tolist() == [True] * 4 + [False] * 12 for piece in corpus.samples)
    with pytest.raises(PrunelabError, match="pieces of 16 tokens"):
        tuning.load(IDS["data"], None, {}, Tokenizer(), length=16, samples=999, prompt=0.25, clean=4, held_out=6)
    with pytest.raises(PrunelabError, match="leaves no prompt"):
        run(prompt=0.01)


def test_dsir_finds_the_target_and_the_training_follows():
    chosen = run("dsir", "0.5", {"min_length": 4})
    assert chosen["samples"]["value"] == chosen["tokens"]["value"] == 50 and chosen["kl_reduction"]["value"] > 0.1
    assert chosen["loss"]["n"] == 6 and chosen["perplexity"]["value"] > 1


@pytest.mark.parametrize(
    ("method", "budget", "samples", "tokens"),
    [("rho1", "0.5", 100, 50), ("rho1_static", "0.5", 100, 50), ("sstoken", "0.5", 100, 50),
     ("q_tuning", "0.5,0.5", 50, None), ("random_tokens", "0.5", 100, 50), ("prior_vlp", "1.0", 100, 100)],
)  # fmt: skip
def test_methods_choose_as_budgeted(method, budget, samples, tokens):
    found = run(method, budget)
    assert found["samples"]["value"] == samples
    assert tokens is None or found["tokens"]["value"] == tokens
    assert found["loss"]["value"] != run()["loss"]["value"]


def test_training_learns_and_repeats_itself():
    first, before = run(steps=40, rate=0.01), run(steps=1, rate=1e-9)
    assert first["loss"]["value"] < before["loss"]["value"] and run(steps=40, rate=0.01) == first


def test_low_rank_adapters_learn_alone_and_are_merged():
    pytest.importorskip("peft")
    found = run("rho1", "0.5", rank=4, steps=40, rate=0.05)
    assert found["loss"]["value"] < run(steps=1, rate=1e-9)["loss"]["value"]
