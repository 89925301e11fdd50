"""The cache task: what follows a pruned prompt is predicted as the model alone would, and bytes are those measured."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import code
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.kv_cache import applied
from prunelab.common.measures import cache
from prunelab.methods.h2o.method import H2O
from tests.unit.kv_cache.test_caches import decoder, prompt

DATA = {"loader": "stories", "folder": "lm", "file": "stories.json"}
SETTINGS = {"length": 40, "prompt": 0.75}


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(letter) % 61 for letter in text]}


@pytest.fixture
def config(monkeypatch, tmp_path):
    (tmp_path / "lm").mkdir()
    stories = ["There was a cat who liked to sit in the sun all day." + "!" * (i % 3) for i in range(6)] + [
        "It ran off."
    ]
    (tmp_path / "lm" / "stories.json").write_text(json.dumps(stories))
    monkeypatch.setattr(cache.loading, "language", lambda identity, config: (decoder(), Letters()))
    return {"assets": str(tmp_path)}


def run(method: str | None = None, budget: str | None = None, options=None, **settings) -> Run:
    ids = {"model": {}, "data": DATA}
    return Run("cache", "assets", method, options or {}, budget, {**SETTINGS, **settings}, ids)


def test_without_pruning_it_is_the_plain_models_perplexity(config):
    model = decoder()
    out = runner.measure(run(), config)
    texts = [[ord(c) % 61 for c in "There was a cat who liked to sit in the sun all day."[:40]]] * 6
    texts.append([ord(c) % 61 for c in "It ran off."])
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in texts:
            start = round(0.75 * len(ids))
            nll = -model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            total, count = total + float(nll[start - 1 :].sum()), count + len(ids) - start
    assert out["loss"]["value"] == pytest.approx(total / count, abs=1e-5)
    assert out["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert out["saving"]["value"] == 0
    everything = runner.measure(run("h2o", "1.0"), config)
    assert everything["loss"]["value"] == pytest.approx(out["loss"]["value"], abs=1e-5)


def test_sizes_are_those_of_the_caches_and_decoding_methods_hold_them(config):
    at_once, stepwise = (runner.measure(run(name, "0.5"), config) for name in ("observed_attention", "h2o"))
    entries = {"observed_attention": (15 + 9, 4 + 2), "h2o": (15, 4)}  # prompts of 30 and 8, read to 39 and 10
    for name, out in (("observed_attention", at_once), ("h2o", stepwise)):
        long, short = entries[name]
        assert out["entries"]["value"] == pytest.approx((6 * long + short) / 7, abs=0.01)
        assert out["gbytes"]["value"] * 1e9 == pytest.approx((6 * long + short) / 7 * 3 * 2 * 2 * 8 * 4, rel=1e-3)
        assert out["saving"]["value"] == pytest.approx(100 * (1 - (6 * long + short) / (6 * 39 + 10)), abs=0.01)
    assert at_once["loss"]["value"] != stepwise["loss"]["value"]


def test_a_token_pruners_cache_holds_what_its_layers_computed(config):
    options = {"layers": (1, 2), "rest": "drop"}
    out = runner.measure(run("lazyllm", "0.5", options), config)
    long, short = (30 + 9, 15 + 9, 7 + 9), (8 + 2, 4 + 2, 2 + 2)  # prompts of 30 and 8, of which the last token stays
    assert out["entries"]["value"] == pytest.approx((6 * sum(long) + sum(short)) / 7 / 3, abs=0.5)
    whole = runner.measure(run("lazyllm", "1.0", options), config)
    assert whole["saving"]["value"] == 0 < out["saving"]["value"]
    assert whole["loss"]["value"] == pytest.approx(runner.measure(run(), config)["loss"]["value"], abs=1e-5)
    back = runner.measure(run("lazyllm", "0.5", {"layers": (1, 2)}), config)
    assert 0 <= back["saving"]["value"] < out["saving"]["value"], "some come back"


def test_a_draft_is_the_model_a_second_time_and_strangers_are_refused(config):
    assert runner.measure(run("spec_kv", "35count", samples=2), config)["perplexity"]["value"] > 1
    with pytest.raises(PrunelabError, match="wanda is a weight_pruner"):
        runner.measure(run("wanda", "0.5"), config)
    with pytest.raises(PrunelabError, match="leave `pairs` out"):
        runner.measure(run(pairs=2), config)
    with pytest.raises(PrunelabError, match="less than 1"):
        runner.measure(run(prompt=1.0), config)


def test_recall_is_the_share_of_answers_that_are_likeliest(config, monkeypatch):
    """The share of the values asked for that are the likeliest token at their places."""
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    pieces = [code.MARK, "Ċ", "key", "_", "Ġ=", *words, *(f"Ġ{w}" for w in words), "x", "Ġ", "ĠĠ"]
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "x"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Split("_", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    asked = code.Recall(torch.randint(5, 60, (3, 24)), torch.tensor([20, 23]), 18)

    class Fixed:
        @classmethod
        def of(cls, given):
            assert given is not None
            return cls()

        def draw(self, stream, count, length, pairs, draws):
            assert (count, length, pairs) == (3, 24, 2)
            return asked

    monkeypatch.setattr(cache.code, "Recalls", Fixed)
    read = cache._Reader(runner.bench(run(pairs=2, length=24), config), decoder())
    out = cache.recall(read.bench, read, tokenizer, 2, 3)
    logits = decoder()(asked.tokens).logits.argmax(-1)
    right = (logits[:, asked.answers - 1] == asked.tokens[:, asked.answers]).float().mean()
    assert out["value"] == pytest.approx(100 * float(right))
    assert out["n"] == 3


def test_logits_behind_a_pruned_prompt_are_those_of_the_model_under_the_method(config):
    model, tokens = decoder(), prompt(2, 20)
    read = cache._Reader(runner.bench(run("h2o", "0.5"), config), model)
    found = read.logits(tokens, 12)
    assert found.shape == (2, 8, 61)
    with torch.no_grad(), applied(H2O(), model, Budget(0.5)):
        out = model(tokens[:, :12], use_cache=True)
        steps = [out.logits[:, -1]]
        for n in range(12, 19):
            steps.append(model(tokens[:, n : n + 1], past_key_values=out.past_key_values).logits[:, 0])
    assert torch.equal(found, torch.stack(steps, 1))
