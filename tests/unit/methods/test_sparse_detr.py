"""Sparse DETR's selection, and the decoder attention it learns from."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from prunelab.common.apply import apply
from prunelab.common.backbones.dino import dino_small
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.selection import descending
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.detr import attention_map, decoder_attention
from prunelab.methods.sparse_detr.method import SparseDETR, choose, kept_counts, saliency_loss

X = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def detector():
    torch.manual_seed(0)
    model = dino_small(width=32, feedforward=64, encoder_layers=2, decoder_layers=2, queries=20)
    return model, SparseDETR().build(adapter_for(model).info)


def test_every_layer_updates_the_same_tokens():
    model, parts = detector()
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[1, 32:] = True
    with apply(SparseDETR(), model.eval(), 0.3, parts=parts.eval()) as handle, torch.no_grad():
        model(X, mask)
        (_, first), (_, second) = handle.kept()
        assert torch.equal(first, second)
        valid = handle.adapter.running.tokens.valid.sum(1).tolist()
        assert (first >= 0).sum(1).tolist() == kept_counts(Budget(0.3), valid) == [int(0.3 * n) + 1 for n in valid]
        assert handle.report().macs < handle.report().dense_macs


def test_keeping_all_changes_nothing():
    model, parts = detector()
    with torch.no_grad():
        dense = model.eval()(X)["logits"]
        with apply(SparseDETR(), model, 1.0, parts=parts.eval()):
            assert torch.allclose(model(X)["logits"], dense, atol=1e-6)


@pytest.mark.parametrize("criterion", ["proposal", "class"])
def test_training_free_stand_ins(criterion):
    model, _ = detector()
    with apply(SparseDETR(criterion), model.eval(), 0.3) as handle, torch.no_grad():
        model(X)
        assert [kept.shape[1] for _, kept in handle.kept()] == [int(0.3 * 85) + 1] * 2
    with pytest.raises(PrunelabError, match="must be one of learned, proposal, class"):
        SparseDETR("norm")


def test_choice_is_in_order():
    ranking = torch.tensor([[3, 0, 2, 1], [1, 2, 0, 3]])
    assert choose(ranking, [2, 2]).index.tolist() == [[0, 3], [1, 2]]
    mixed = choose(ranking, [3, 1])
    assert mixed.valid is not None and mixed.index[mixed.valid].tolist() == [0, 2, 3, 1]


def test_attention_map_is_shared_among_the_four_tokens_around_a_sample():
    shapes = [(2, 3), (1, 1)]
    places = torch.full((1, 1, 1, 2, 1, 2), 5.0)  # far outside
    places[0, 0, 0, 0, 0] = torch.tensor([1.25 / 3, 0.5 / 2])
    weights = torch.tensor([0.8, 0.2]).view(1, 1, 1, 2, 1)
    received = attention_map(places, weights, shapes)
    want = 0.8 * torch.tensor([0.0, 0.75 * 0.5, 0.25 * 0.5, 0.0, 0.75 * 0.5, 0.25 * 0.5, 0.0])
    assert torch.allclose(received[0], want)


def test_attention_map_is_the_gradient_of_sampling():
    """Sampling is linear in its values, so the attention a token receives is the output's derivative by it; the map
    is half a token off."""
    torch.manual_seed(0)
    height, width = 5, 7
    places, weights = torch.rand(1, 4, 2, 1, 3, 2) * 0.6 + 0.2, torch.rand(1, 4, 2, 1, 3)
    values = torch.zeros(1, 1, height, width, requires_grad=True)
    shifted = places + 0.5 / places.new_tensor([width, height])
    sampled = functional.grid_sample(values, 2 * shifted.view(1, -1, 1, 2) - 1, align_corners=False)
    (sampled.flatten() * weights.flatten()).sum().backward()
    assert torch.allclose(attention_map(places, weights, [(height, width)]), values.grad.flatten(1), atol=1e-6)


def test_scorer_learns_what_the_decoder_looks_at():
    model, parts = detector()
    wanted = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    with apply(SparseDETR(), model.train(), 0.3, parts=parts.train()), decoder_attention(model, 20) as seen:
        model.loss(X, None, wanted, torch.Generator().manual_seed(0))
        assert len(seen) == 2 and seen[0][0].shape[1] == 20, "denoising copies are left out"
        loss = saliency_loss(parts, seen)
    loss.backward()
    assert all(p.grad is not None for p in parts.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    kept, received = parts.scored.counts, attention_map(*seen[0], parts.scored.shapes)
    received += attention_map(*seen[1], parts.scored.shapes)
    perfect = torch.full_like(received, -20.0).scatter(1, descending(received)[:, : kept[0]], 20.0)
    with torch.no_grad():
        object.__setattr__(parts.scored, "logits", perfect)
        assert saliency_loss(parts, seen) < 1e-3 < loss
    parts.scored = None
    with pytest.raises(PrunelabError, match="nothing to learn from"):
        saliency_loss(parts, seen)


def test_models_without_such_a_decoder_are_refused():
    with pytest.raises(PrunelabError, match="no decoder"), decoder_attention(torch.nn.Linear(1, 1), 5):
        pass
