"""Zero-TPrune beyond its golden cases: what the paper says and no released code shows."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.costs import meter
from prunelab.common.models import loading
from prunelab.methods.zero_tprune.method import ZeroTPrune, combine_heads, page_rank, similar_units, start
from tests.contract.references import images, signals, vit

# (architecture, layers, rates, GMACs printed in the authors' notebook)
NOTEBOOK = [
    ("deit_small_patch16_224", (2, 5, 8), "0.9,0.8,0.7", 3.555),
    ("deit_small_patch16_224", (2, 5, 8), "0.8", 3.344),
    ("deit_small_patch16_224", (2, 5, 8), "0.7", 2.873),
    ("deit_small_patch16_224", (2, 5, 8), "0.6", 2.478),
    ("deit_base_patch16_224", (2, 5, 8), "0.9", 15.02),
    ("deit_base_patch16_224", (2, 5, 8), "0.9,0.8,0.7", 13.628),
    ("deit_tiny_patch16_224", (2, 5, 8), "0.9,0.8,0.7", 0.963),
    ("deit_tiny_patch16_224", (2, 5, 8, 9, 10, 11), "0.8,0.8,0.7,0.7,0.7,0.7", 0.849),
]


@pytest.mark.parametrize(("name", "layers", "rates", "printed"), NOTEBOOK)
def test_costs_are_the_printed_ones(name, layers, rates, printed):
    model = loading.architecture({"library": "timm", "name": name})
    with apply(ZeroTPrune(layers=layers), model, Budget.parse(rates)) as handle:
        report = handle.report()
        norms = 5 * meter.norm_elements(model, handle.adapter.example())
    plain = (report.macs - report.scoring_macs) / 1e9
    assert plain == pytest.approx(printed, rel=0.005)  # ours, matrix products alone
    assert plain + norms / 1e9 == pytest.approx(printed, abs=6e-4)  # the authors' tool, to the printed digit


def stochastic(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, n, n, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def test_page_rank_converges_to_the_stationary_distribution():
    attention = stochastic(9)
    scores = page_rank(attention, start(attention), 200)
    assert torch.allclose((scores.unsqueeze(-2) @ attention).squeeze(-2), scores, atol=1e-6)
    assert torch.allclose(scores.sum(-1), torch.ones(1, 2), atol=1e-5)


def test_votes_count_what_a_token_receives():
    attention = torch.zeros(1, 1, 3, 3)
    attention[..., 2] = 1  # everyone looks at token 2
    assert page_rank(attention, start(attention), 1)[0, 0].tolist() == [0, 0, 1]


def test_subgraph_equals_the_smaller_matrix():
    attention, alive = stochastic(8), torch.tensor([[True, True, False, True, True, False, True, True]])
    got = page_rank(attention, start(attention), 6, alive=alive[:, None])[..., alive[0]]
    small = attention[..., alive[0], :][..., alive[0]]
    small = small / small.sum(-1, keepdim=True)
    want = page_rank(small, torch.full((1, 2, 6), 1 / 8), 6)
    assert torch.allclose(got, want, atol=1e-6)


def test_class_token_starts_sqrt_n_times_heavier():
    scores = start(torch.zeros(1, 1, 16, 16), 4.0)
    assert float(scores[0, 0, 0] / scores[0, 0, 1]) == pytest.approx(4)
    assert float(scores.sum()) == pytest.approx(1)


def test_head_filter_drops_flat_and_spiky_heads():
    flat, good, spiky = torch.full((100,), 0.01), torch.linspace(0, 0.02, 100), torch.zeros(100)
    spiky[0] = 1.0
    heads = torch.stack([flat, good, spiky])[None]
    assert torch.allclose(combine_heads(heads, "rms", (0.01, 0.7)), combine_heads(heads[:, 1:2], "rms"))
    none_left = torch.stack([flat, spiky])[None]
    assert torch.equal(combine_heads(none_left, "rms", (0.01, 0.7)), combine_heads(none_left, "rms"))


def test_s_stage_drops_the_copy_of_an_important_token():
    importance = torch.tensor([[0.9, 0.8, 0.7, 0.3, 0.2, 0.1]])
    features = torch.eye(6)[None].clone()
    features[0, 4] = features[0, 1] * 3  # a less important copy of token 1
    assert similar_units(importance, features, 1).nonzero().tolist() == [[0, 4]]
    assert similar_units(importance, features, 1, "sequential-I").nonzero().tolist() == [[0, 1]]
    assert similar_units(importance, features, 1, "none").nonzero().tolist() == [[0, 4]]


@pytest.mark.parametrize("partition", ["sequential-U", "sequential-I", "alternating", "random", "none"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "l1", "l2"])
@pytest.mark.parametrize("feature", ["keys", "queries", "values", "hidden"])
def test_every_variant_meets_the_budget(partition, metric, feature):
    method = ZeroTPrune(partition=partition, metric=metric, feature=feature, similar=0.5)
    plan = method.plan(Site(2), signals(patches=21)[0], Budget(0.5))
    assert plan.reduce.index.shape == (2, 11)


def test_votes_follow_the_depth():
    info = ModelInfo("x", 12, 3, 24, 17, 1, True)
    assert [ZeroTPrune().votes(Site(layer), info) for layer in (0, 2, 3, 8, 9, 11)] == [30, 30, 5, 5, 1, 1]
    assert ZeroTPrune(iterations=(7, 3, 1)).votes(Site(5, index=1), info) == 3


def test_a_block_that_does_not_prune_computes_no_attention(monkeypatch):
    from prunelab.common.core import attention

    seen = []
    original = attention.weights
    monkeypatch.setattr(attention, "weights", lambda q, *a: seen.append(q.shape) or original(q, *a))
    with torch.no_grad(), apply(ZeroTPrune(layers=(2, 5)), vit(), 0.5):
        vit()(images())
        assert not seen, "another model is not touched"
    model = vit()
    with torch.no_grad(), apply(ZeroTPrune(layers=(2, 5)), model, 0.5):
        model(images())
    assert len(seen) == 2
