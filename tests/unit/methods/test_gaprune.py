"""GAPrune: scores at their edges, shares of layers, what it reads, and bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.methods.gaprune.method import GAPrune, alignment, dai, local_alignment, processed, smallest, spread_out
from tests.contract.references import language_model, token_ids
from tests.contract.weights_references import triplets

CORPORA = {"domain": triplets(4, 1), "general": triplets(5, 2)}


def run(method: GAPrune, keep=0.5, family="llama"):
    model = language_model(family)
    return model, prune(method, model, keep, CORPORA, objective="contrastive", progress=False)


def test_alignment_is_a_cosine_and_its_smoothing_a_mean_over_neighbours():
    a = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert float(alignment(a, 3 * a)) == pytest.approx(1) and float(alignment(a, -a)) == pytest.approx(-1)
    local = local_alignment(a, a)
    unit = (a / a.norm()) ** 2
    assert float(local[2, 3]) == pytest.approx(float(unit[1:4, 2:5].mean()), rel=1e-5)
    assert float(local[0, 0]) == pytest.approx(float(unit[:2, :2].sum() / 9), rel=1e-5), "zeros around count"
    assert local_alignment(a[:2], a[:2]).shape == (3, 7) and local_alignment(a[0], a[0]).shape == (6,)
    assert torch.equal(local_alignment(a[:1], a[:1]), local_alignment(a[0], a[0])[None]), "a single row has no window"
    small = a * (1e-6 / a.norm())  # as the released constant has it, a hundredth of the norm is added to it
    assert float(alignment(small, a)) == pytest.approx(1 / 1.01) and float(alignment(small / 1e3, a)) == 0


def test_scores_rise_with_domain_and_size_and_fall_with_the_general_corpus():
    one, zero = torch.ones(2, 2), torch.zeros(2, 2)
    base = dai(one, one, one, zero, 1.0, 0.5)
    assert bool((dai(one, 2 * one, one, zero, 1.0, 0.5) > base).all())
    assert bool((dai(one, one, 2 * one, zero, 1.0, 0.5) < base).all())
    clamped = dai(one, 2 * one, one, 50 * one, 1.0, 0.0)
    assert torch.allclose(clamped, torch.nn.functional.softplus(1.2 * one))
    weight = torch.tensor([1.0, -3.0])
    alike = dai(weight, torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0, 0.0)
    assert alike[1] > alike[0], "where all scores are the same, sizes decide"


def test_scales():
    score = torch.tensor([[3.0, 1.0], [2.0, 5.0]])
    assert processed(score, "rank").tolist() == [[0.75, 0.25], [0.5, 1.0]]
    assert processed(score, "minmax").flatten().tolist() == pytest.approx([0.5, 0, 0.25, 1])
    assert float(processed(score, "zscore_sigmoid", 0.5).mean()) == pytest.approx(0.5, abs=0.1)
    assert torch.equal(processed(score, "none"), score)


def test_shares_of_layers_and_ties():
    assert spread_out(10, [10, 10, 10]) == [4, 3, 3]
    assert spread_out(29, [10, 20]) == [9, 19] and spread_out(0, [100, 100]) == [5, 5]
    kept = smallest([torch.zeros(3), torch.zeros(2)], 4)
    assert [mask.tolist() for mask in kept] == [[False] * 3, [False, True]]
    assert sum(int(m.sum()) for m in smallest([torch.zeros(3)], 3)) == 1, "one always stays"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_totals_and_layers(family):
    model, plan = run(GAPrune(), 0.5, family)
    kept, whole = (sum(x) for x in zip(*((d.kept, t.units) for t, d in plan.decisions()), strict=True))
    assert kept == whole - whole // 2
    assert all(".mlp." in target.name for target, _ in plan.decisions())
    dense = language_model(family)
    assert all(torch.equal(p, dense.get_parameter(n)) for n, p in model.named_parameters() if "mlp" not in n)
    _, both = run(GAPrune(layers=("mlp", "attention"), strategy="uniform"), 0.7)
    by_block: dict[int, int] = {}
    for target, decision in both.decisions():
        by_block[target.block] = by_block.get(target.block, 0) + target.units - decision.kept
    assert len(by_block) == 3 and max(by_block.values()) - min(by_block.values()) <= 1


def test_options_change_what_is_pruned():
    plain = run(GAPrune())[1]
    for other in (GAPrune(beta=0.0, gamma=0.0), GAPrune(post="rank"), GAPrune(fusion_alpha=50.0, fusion_beta=0.0)):
        assert plain.diff(run(other)[1]) != "the plans are equal", other


def test_bad_input_is_named():
    with pytest.raises(PrunelabError, match="no corpus 'domain'"):
        prune(GAPrune(), language_model(), 0.5, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="one share of all weights"):
        prune(GAPrune(), language_model(), (0.5, 0.5, 0.5), CORPORA, objective="contrastive", progress=False)
    with pytest.raises(PrunelabError, match="gaprune: beta"):
        GAPrune(beta=-1.0)


def test_what_counts_as_not_given_is_as_released():
    score = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(processed(score, "zscore_sigmoid", 0.0), processed(score, "zscore_sigmoid", 1.0))
    assert torch.equal(processed(score, "zscore_sigmoid", -3.0), processed(score, "zscore_sigmoid", 1e-6))
    weight, fisher = score + 1, score.abs()
    assert torch.equal(GAPrune(fusion_beta=0.0).fused(score, weight, fisher), score)
    assert torch.equal(
        GAPrune(fusion_beta=0.0, fusion_alpha=2.0).fused(score, weight, fisher), 2 * fisher * weight.abs() + score
    )


def test_shares_of_layers_have_bounds():
    scores = [torch.rand(10), torch.rand(10)]
    kept = GAPrune(least=0.4, most=0.6).uniformly([0, 1], scores, 2)
    assert [int((~mask).sum()) for mask in kept] == [4, 4]
    kept = GAPrune(least=0.0, most=0.3).uniformly([0, 1], scores, 18)
    assert [int((~mask).sum()) for mask in kept] == [3, 3]
