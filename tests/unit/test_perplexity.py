"""Perplexity: sequences cut as the papers cut them, and the figures that follow."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.data import texts
from common.errors import PrunelabError
from common.papers import Run
from common.tasks import perplexity


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(letter) % 64 for letter in text]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()


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


def test_task_measures_a_model_and_refuses_what_does_not_fit(monkeypatch, model, assets):
    monkeypatch.setattr(perplexity.models, "language", lambda identity, config: (model, Letters()))
    found = perplexity.execute(run(length=8), assets)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(found["loss"]["value"]), abs=1e-3)
    assert found["tokens"]["value"] == 7 * found["loss"]["n"] and 0 <= found["accuracy"]["value"] <= 100
    for length in (1, 33):
        with pytest.raises(PrunelabError, match="2 to 32"):
            perplexity.execute(run(length=length), assets)


def test_nan_is_refused(model):
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
        with pytest.raises(PrunelabError, match="NaN"):
            perplexity.predict(broken, torch.arange(5))
