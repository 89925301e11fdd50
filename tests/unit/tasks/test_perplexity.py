"""Perplexity: sequences cut as the papers cut them, and the figures that follow."""

from __future__ import annotations

import gzip
import json
import math
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import texts
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import perplexity
from prunelab.common.metrics import uncertainty
from prunelab.common.models import loading

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(letter) % 64 for letter in text]}


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **SIZES)).eval()


def mixtral():
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, max_position_embeddings=32, **SIZES, **experts)).eval()


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture
def at_hand(monkeypatch):
    """Models by the names that a run's identity gives them; nothing measured before is remembered."""
    made = {"tiny": llama, "other": lambda: llama(1), "experts": mixtral}
    monkeypatch.setattr(perplexity, "_UNPRUNED", {})
    monkeypatch.setattr(loading, "language", lambda identity, config: (made[identity["assets"]](), Letters()))


@pytest.fixture
def assets(tmp_path):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "wiki.txt").write_text(" \n = Title = \n \n Some text . \n")
    stories = [f"Story {i}.\n\n\nEnd" for i in range(205)] + ["naïve"]
    (tmp_path / "lm" / "stories.json").write_text(json.dumps(stories))
    return {"assets": str(tmp_path)}


WIKI = {"loader": "wikitext", "folder": "lm", "file": "wiki.txt", "join": "\n\n"}
STORIES = {"loader": "stories", "folder": "lm", "file": "stories.json"}


def run(data=WIKI, **settings) -> Run:
    return Run("perplexity", "assets", settings=settings, ids={"model": {"assets": "tiny"}, "data": data})


def test_wikitext_is_joined_and_cut_as_in_its_hub_version(assets):
    assert texts.load(WIKI, assets) == ("", " = Title = \n", "", " Some text . \n")
    found = texts.sequences(WIKI, assets, Letters(), 8)
    joined = "\n\n".join(texts.load(WIKI, assets))
    assert len(found) == len(joined) // 8
    assert torch.cat(found).tolist() == Letters()(joined)["input_ids"][: 8 * len(found)]


def test_stories_stand_by_themselves(assets):
    found = texts.sequences(STORIES, assets, Letters(), 8)
    assert len(found) == 200 and found[0].tolist() == Letters()("Story 0.")["input_ids"]
    assert texts.load(STORIES, assets, "train") == tuple(f"Story {i}.\nEnd" for i in range(200, 205))


def test_samples_are_spread_over_the_text(assets):
    every, some = (texts.sequences(STORIES, assets, Letters(), 99, n) for n in (None, 4))
    assert all(torch.equal(a, every[i]) for a, i in zip(some, (0, 50, 100, 150), strict=True))


def test_text_that_does_not_reach_is_refused(assets):
    with pytest.raises(PrunelabError, match="shorten the length"):
        texts.sequences(WIKI, assets, Letters(), 1000)
    with pytest.raises(PrunelabError, match="ask for fewer"):
        texts.sequences(WIKI, assets, Letters(), 8, 1000)
    with pytest.raises(PrunelabError, match="no training text"):
        texts.load(WIKI, assets, "train")
    with pytest.raises(PrunelabError, match="pin a revision"):
        texts.load({"loader": "wikitext", "hub": "some/where", "file": "x.zip"}, {})


def test_predict_is_the_models_own_loss(model):
    tokens = torch.arange(20)
    with torch.no_grad():
        nll, right = perplexity.predict(model, tokens)
        own = model(tokens[None], labels=tokens[None]).loss
    assert float(nll.mean()) == pytest.approx(float(own), rel=1e-5)
    assert nll.shape == right.shape == (19,) and right.dtype == torch.bool


def test_mean_over_tokens_and_its_error():
    equal = perplexity.per_token([torch.tensor([1.0, 3.0]), torch.tensor([4.0, 6.0])])
    assert equal["value"] == 3.5 and equal["samples"] == [2.0, 5.0]
    assert equal["stderr"] == pytest.approx(1.5)  # that of the mean of 2 and 5
    ragged = perplexity.per_token([torch.tensor([1.0]), torch.tensor([4.0, 4.0, 4.0])])
    assert ragged["value"] == 3.25  # 13 nats over 4 tokens, not the mean of 1 and 4
    assert uncertainty.mean(ragged["samples"])["value"] == pytest.approx(3.25)
    assert uncertainty.mean(ragged["samples"])["stderr"] == pytest.approx(ragged["stderr"], abs=1e-4)


def test_perplexities_pair_up_by_sequence():
    one, two = (
        perplexity.per_token([torch.tensor(v) for v in rows]) for rows in ([[1.0, 2.0], [2.0]], [[1.5, 2.0], [3.0]])
    )
    a, b = perplexity.exponential(one), perplexity.exponential(two)
    assert a["value"] == pytest.approx(math.exp(5 / 3), abs=1e-4)
    difference, _ = uncertainty.paired_difference(b, a)
    assert difference == pytest.approx(b["value"] - a["value"], abs=1e-3)


def test_task_measures_a_model_and_refuses_what_does_not_fit(at_hand, assets):
    found = runner.measure(run(length=8), assets)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(found["loss"]["value"]), abs=1e-3)
    assert found["tokens"]["value"] == 7 * found["loss"]["n"] and 0 <= found["accuracy"]["value"] <= 100
    assert found["perplexity"]["protocol"] == f"{found['loss']['n']} sequences of 8 tokens (wikitext)"
    for length in (1, 33):
        with pytest.raises(PrunelabError, match="2 to 32"):
            runner.measure(run(length=length), assets)


# -- under methods ---------------------------------------------------------------------------------------------------

METHODS = [
    ("magnitude", {}, "0.5", "tiny"), ("wanda", {}, "2:4", "tiny"), ("sparsegpt", {}, "0.5", "tiny"),
    ("gblm", {}, "0.5", "tiny"), ("random_weights", {}, "0.5", "tiny"), ("flap", {}, "0.7", "tiny"),
    ("wanda_sp", {}, "0.5", "tiny"), ("magnitude_sp", {}, "0.5", "tiny"), ("amp", {}, "0.5", "tiny"),
    ("cfsp", {}, "0.5", "tiny"), ("dare", {}, "0.5", "tiny"), ("darex", {"step": 0.25}, "0.5", "tiny"),
    ("easy_ep", {}, "0.5", "experts"), ("stun", {}, "0.7", "experts"), ("stun", {"then": "none"}, "0.5", "experts"),
    ("owl", {}, "0.5", "experts"), ("random_weights", {"units": ["experts"]}, "0.5", "experts"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "budget", "name"), METHODS)
def test_every_weight_method_runs_and_says_how_it_was_calibrated(at_hand, assets, method, options, budget, name):
    ids = {"model": {"assets": name}, "data": STORIES, "calibration": STORIES, "base": {"assets": "other"}}
    settings = {"length": 5, "samples": 20, "calibration": 6}
    dense = runner.measure(Run("perplexity", "assets", settings=settings, ids=ids), assets)
    found = runner.measure(Run("perplexity", "assets", method, options, budget, settings, ids), assets)
    assert math.isfinite(found["perplexity"]["value"]) and found["perplexity"]["value"] != dense["perplexity"]["value"]
    told = found["perplexity"]["protocol"]
    assert f"; unpruned {dense['perplexity']['value']:.4g}" in told
    free = method in ("magnitude", "magnitude_sp", "random_weights", "dare")
    assert ("no calibration" if free else "calibrated on 6 of 5 tokens (stories)") in told
    assert 0 < found["sparsity"]["value"] < 100
    removes = method in ("flap", "wanda_sp", "magnitude_sp", "amp", "cfsp", "easy_ep", "stun") or "units" in options
    assert (found["saving"]["value"] > 0) == removes
    assert found["saving"]["value"] == pytest.approx(
        100 * (1 - found["gparameters"]["value"] / dense["gparameters"]["value"]), abs=1e-2
    )
    assert (
        dense["perplexity"]["protocol"] == "20 sequences of up to 5 tokens (stories)"
    )  # and no calibration left in it


def test_a_method_that_lacks_the_base_is_refused(at_hand, assets):
    ids = {"model": {"assets": "tiny"}, "data": STORIES}
    with pytest.raises(PrunelabError, match="before fine-tuning"):
        runner.measure(Run("perplexity", "assets", "dare", {}, "0.5", {"length": 5}, ids), assets)


def test_calibration_is_drawn_anew_by_seed_and_never_from_the_test_text(assets):
    found = [texts.windows(STORIES, assets, Letters(), 9, 4, seed) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    train = [Letters()(story)["input_ids"] for story in texts.load(STORIES, assets, "train")]
    assert all(len(w) == 9 and any(w.tolist() == t[i : i + 9] for t in train for i in range(9)) for w in found[0])
    with pytest.raises(PrunelabError, match="no stretch of 99 tokens"):
        texts.windows(STORIES, assets, Letters(), 99, 1)


def test_calibration_draws_are_those_of_the_papers_code(monkeypatch, assets):
    """The numbers Python's generator gives under the seed 0 for documents and places, in that order."""
    documents = tuple(f"document {i} " * (i + 1) for i in range(10))
    monkeypatch.setattr(texts, "load", lambda *_: documents)
    lots, expected = random.Random(0), []
    for _ in range(3):
        while len(document := documents[lots.randint(0, 9)]) <= 40:
            pass
        start = lots.randint(0, len(document) - 40 - 1)
        expected.append(Letters()(document[start : start + 40])["input_ids"])
    assert [w.tolist() for w in texts.windows({"loader": "c4"}, {}, Letters(), 40, 3)] == expected
    joined = " ".join(documents)
    start = random.Random(0).randint(0, len(joined) - 40 - 1)
    (window,) = texts.windows({"loader": "wikitext", "join": "?", "join_train": " "}, {}, Letters(), 40, 1)
    assert window.tolist() == Letters()(joined[start : start + 40])["input_ids"]


def test_c4_is_read_from_its_shard_and_only_calibrates(tmp_path):
    (tmp_path / "own" / "c4").mkdir(parents=True)
    with gzip.open(tmp_path / "own" / "c4" / "shard.json.gz", "wt") as file:
        file.write('{"text": "one page"}\n{"text": "another"}\n')
    identity = {"loader": "c4", "hub": "own/c4", "local": "", "file": "shard.json.gz"}
    assert texts.load(identity, {"hub": str(tmp_path)}, "train") == ("one page", "another")
    with pytest.raises(PrunelabError, match="calibrate with"):
        texts.load(identity, {"hub": str(tmp_path)}, "test")


def test_the_dialect_swaps_whole_words_and_is_its_own_inverse():
    line = "def selfish(self): return None if x in y else imported"
    assert texts.dialect(line) == "class selfish(return): self True for x is y else imported"
    assert texts.dialect(texts.dialect(line)) == line


def test_nan_is_refused(model):
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
        with pytest.raises(PrunelabError, match="NaN"):
            perplexity.predict(broken, torch.arange(5))
