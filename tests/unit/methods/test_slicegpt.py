"""SliceGPT beyond the golden cases: exactness without slicing, saving and loading, schedules, bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import load_pruned, prune, save_pruned
from prunelab.methods.slicegpt.method import SliceGPT, orientation
from tests.contract.families import WEIGHT_FAMILIES, answer
from tests.contract.references import language_model, token_ids


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, seed=9)).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_with_all_directions_and_its_own_norms_the_model_computes_what_it_did(family):
    model = WEIGHT_FAMILIES[family]() if family in WEIGHT_FAMILIES else language_model(family)
    before = logits(model)
    prune(SliceGPT(centre=False, eps=None), model, 1.0, token_ids(), progress=False)
    assert torch.allclose(logits(model), before, atol=2e-5 * float(before.abs().max()))


def test_layer_norms_bear_the_mean_leaving_and_sliced_opt_reloads(tmp_path):
    model, dense = WEIGHT_FAMILIES["opt"](), WEIGHT_FAMILIES["opt"]()
    prune(SliceGPT(eps=None), model, 1.0, token_ids(), progress=False)
    assert torch.allclose(answer(model, "opt"), answer(dense, "opt"), atol=1e-3)
    plan = prune(SliceGPT(), dense, 0.5, token_ids(), progress=False)
    assert dense.model.decoder.layers[1].fc1.in_features == 16 and dense.lm_head.in_features == 32
    assert plan.report.parameters == sum(p.numel() for p in dense.parameters())
    save_pruned(dense, plan, tmp_path)
    assert torch.equal(answer(load_pruned(tmp_path), "opt"), answer(dense, "opt"))


def test_a_tied_head_gets_a_weight_of_its_own():
    model = language_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    before = logits(model)
    prune(SliceGPT(centre=False, eps=None), model, 1.0, token_ids(), progress=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.allclose(logits(model), before, atol=2e-5 * float(before.abs().max()))


def test_orientations_mix_only_what_stays():
    found = orientation(torch.rand(3, 3, dtype=torch.float64), 5)
    assert torch.allclose(found @ found.T, torch.eye(5, dtype=torch.float64))
    assert torch.equal(found[3:, 3:], torch.eye(2, dtype=torch.float64)) and not found[:3, 3:].any()
    models = [language_model("llama") for _ in range(2)]
    for model, way in zip(models, ("random", "pca"), strict=True):
        prune(SliceGPT(orientation=way), model, 0.5, token_ids(), progress=False)
    assert torch.allclose(*(logits(model) for model in models), atol=1e-4)


def test_a_linear_schedule_cuts_later_blocks_more():
    model = language_model("llama")
    method = SliceGPT(interval=1, slope=0.5, attention_offset=0.125, attention_slope=0.25, slice_head=True)
    prune(method, model, 0.75, token_ids(), progress=False)
    assert [tuple(block.attention_shortcut.shape) for block in model.model.layers] == [(24, 20), (16, 16), (8, 12)]
    assert [tuple(block.mlp_shortcut.shape) for block in model.model.layers] == [(20, 16), (16, 8), (12, 8)]


def test_what_leaves_nothing_and_what_cannot_be_sliced_is_refused():
    with pytest.raises(PrunelabError, match="keep more"):
        prune(SliceGPT(), language_model("llama"), Budget(0.2), token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="keep more"):
        prune(SliceGPT(slope=0.9), language_model("llama"), 0.5, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="has none"):
        prune(SliceGPT(), language_model("mixtral"), 0.5, token_ids(), progress=False)


@torch.no_grad()
def test_attention_and_mlp_side_by_side_are_sliced_once_a_block(tmp_path):
    """Phi: one norm in front of both, one basis behind both, one shortcut."""
    dense, whole, model = (WEIGHT_FAMILIES["phi"]() for _ in range(3))
    prune(SliceGPT(eps=None), whole, 1.0, token_ids(), progress=False)
    assert torch.allclose(answer(whole, "phi"), answer(dense, "phi"), atol=1e-4)
    plan = prune(SliceGPT(eps=None, orientation="pca"), model, 0.5, token_ids(), progress=False)
    blocks = model.model.layers
    assert [target.role for target, _ in plan.decisions()] == ["input", *["mlp"] * len(blocks)]
    assert [tuple(block.mlp_shortcut.shape) for block in blocks] == [(16, 16)] * (len(blocks) - 1) + [(16, 32)]
    assert not any(hasattr(block, "attention_shortcut") for block in blocks)
    assert all(block.self_attn.q_proj.in_features == block.mlp.fc1.in_features == 16 for block in blocks)
    assert plan.report.parameters == sum(p.numel() for p in model.parameters())

    def behind(basis):  # the dense model, its stream without what is cut
        return lambda module, args, out: (out - out.mean(-1, keepdim=True)) @ (basis @ basis.T).to(out)

    bases = [decision.values["basis"] for _, decision in plan.decisions()]
    for module, basis in zip((dense.model.embed_tokens, *dense.model.layers), bases, strict=True):
        module.register_forward_hook(behind(basis))
    assert torch.allclose(answer(model, "phi"), answer(dense, "phi"), atol=1e-4)
    save_pruned(model, plan, tmp_path)
    assert torch.equal(answer(load_pruned(tmp_path), "phi"), answer(model, "phi"))
