"""Channels that leave the residual stream: the model computes what it did where they were zero."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.methods.random_weights.method import RandomWeights
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids


def silent(model, gone):
    """Nothing writes these channels."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, gone] = 0
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight[gone] = 0


@pytest.mark.parametrize("family", ["llama", "llama_mha", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_silent_channels_leave_and_nothing_changes(family, tied):
    model, ids = language_model(family, tie_word_embeddings=tied), token_ids()
    gone = torch.tensor([1, 5, 8, 30])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    silent(model, gone)
    with torch.no_grad():
        want = model(ids).logits
    adapter = weight_adapter(model)
    (target,) = adapter.targets("hidden")
    before = sum(p.numel() for p in model.parameters())
    adapter.remove(target, torch.tensor([i for i in range(32) if i not in gone.tolist()]))
    assert before - sum(p.numel() for p in model.parameters()) == 4 * target.size
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, want, atol=1e-3)  # norms add a little to what they divide by
        assert model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] >= 13


@pytest.mark.parametrize("budget", [0.5, 0.72])
def test_narrow_models_come_back_from_disk(budget, tmp_path):
    model, ids = language_model("llama"), token_ids(2, seed=9)
    plan = prune(RandomWeights(("hidden",)), model, budget, progress=False)
    save_pruned(model, plan, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path)(ids).logits, model(ids).logits)
        again = language_model("llama")
        WeightPlan.load(tmp_path / "plan").apply(again)
        assert torch.equal(again(ids).logits, model(ids).logits)
        if plan.header["stock"]:
            assert torch.equal(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
    assert plan.header["stock"] is (model.config.hidden_size % 4 == 0)


def test_streams_that_other_things_share_have_no_such_target():
    for family in ("gemma2", "gpt2", "opt", "phi", "deepseek_v3"):
        assert weight_adapter(WEIGHT_FAMILIES[family]()).targets("hidden") == []
    assert weight_adapter(language_model("mixtral")).targets("hidden") == []
