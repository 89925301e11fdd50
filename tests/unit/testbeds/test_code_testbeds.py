"""The mixture of experts of source code, and the fine-tuning in another language: recipes, losses, starts."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save

from prunelab.common import testbeds
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import code, texts
from prunelab.common.testbeds.code_lm import CodeLM
from prunelab.common.testbeds.code_lm_tuned import CodeLMTuned
from prunelab.common.testbeds.code_moe import CodeMoE
from prunelab.common.training.recipe import plain
from prunelab.common.training.trainer import fit

SMALL = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "inner": 12, "vocabulary": 320}
FILES = tuple(  # with two words that are one token each, with and without a blank before them
    f"def function_{i}(self):\n    return self.value if self else None\nalpha = gamma\ngamma = alpha\n"
    for i in range(30)
)


@pytest.fixture(autouse=True)
def written(monkeypatch):
    """Source files of a few lines, and their tokenizer."""
    tokenizer = code.train_tokenizer(FILES, SMALL["vocabulary"])
    monkeypatch.setattr(code, "files", lambda split: FILES[:20] if split == "train" else FILES[20:])
    monkeypatch.setattr(code, "tokenizer", lambda vocabulary: tokenizer)
    monkeypatch.setattr(code, "stream", lambda split, vocabulary: code.encode(code.files(split), tokenizer))


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """A dense model among the shipped weights."""
    recipe = CodeLM(**SMALL, context=64)
    torch.manual_seed(0)
    weights = save({name: value.contiguous() for name, value in recipe.build().state_dict().items()})
    tokenizer = recipe.extras()["tokenizer.json"]
    log = {
        "testbed": "code_lm",
        "recipe": plain(vars(recipe)),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "extras": {"tokenizer.json": hashlib.sha256(tokenizer.encode()).hexdigest()},
    }
    (tmp_path / "code_lm").mkdir()
    (tmp_path / "code_lm" / "model.safetensors").write_bytes(weights)
    (tmp_path / "code_lm" / "tokenizer.json").write_bytes(tokenizer.encode())
    (tmp_path / "code_lm" / "training.json").write_text(json.dumps(log))
    monkeypatch.setattr(testbeds, "SHIPPED", tmp_path)
    return tmp_path


def test_a_token_costs_the_mixture_what_it_costs_the_dense_model():
    dense, mixture = CodeLM(), CodeMoE()
    assert mixture.chosen * mixture.inner == dense.inner
    config = mixture.config()
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert testbeds.get("code_moe") is CodeMoE and testbeds.get("code_lm_tuned") is CodeLMTuned


def test_the_mixture_learns_and_its_balance_counts():
    recipe = CodeMoE(**SMALL, context=32, lengths=(16, 32), stages=(0.5,), batch=2)
    torch.manual_seed(0)
    model = recipe.build().train()
    draws = torch.Generator().manual_seed(0)
    assert recipe.loss(model, 0.9, draws).isfinite()
    tokens = torch.arange(64).view(2, 32)
    plain, weighed = (CodeMoE(**SMALL, balance=b).surprise(model, tokens) for b in (0.0, 1.0))
    extra = (weighed - plain).detach()  # the same for every token: top-k times one where experts are used alike
    assert extra.std() < 1e-3 and 1.5 < float(extra.mean()) < 4
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = recipe.loss(model, 0.0, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert {"perplexity", "accuracy"} <= recipe.evaluate(model.eval(), quick=True).keys()


def test_fine_tuning_starts_from_the_shipped_weights_and_speaks_the_dialect(shipped, tmp_path):
    recipe = CodeLMTuned(steps=6, batch=4, length=32, rate=1e-2, check_every=3)
    start = recipe.build()
    original = testbeds.load("code_lm")[0].state_dict()
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), original.values(), strict=True))
    with torch.no_grad():
        before = recipe.evaluate(start.eval(), quick=True)
    log = fit(recipe, tmp_path / "tuned")
    assert log["test"]["perplexity"] < before["perplexity"] and "before_perplexity" in log["test"]
    assert log["recipe"]["start"] == recipe.start and (tmp_path / "tuned" / "tokenizer.json").exists()
    decoded = recipe.tokenizer.decode(recipe.stream("train").tolist()[:40])
    assert texts.dialect(FILES[0])[:20] in decoded


def test_weights_that_were_trained_anew_since_are_refused(shipped):
    with pytest.raises(PrunelabError, match="train code_lm_tuned again"):
        CodeLMTuned(start="0" * 64).build()
