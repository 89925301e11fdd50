"""Masks of the weight-pruning methods, and SparseGPT against exact optimal brain surgery."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import masks, prune
from prunelab.common.weights.obs import inverse_factor
from prunelab.common.weights.statistics import Fluctuation, InputMean, InputNorm, SecondMoment
from prunelab.methods.magnitude.method import Magnitude
from prunelab.methods.sparsegpt.method import SparseGPT, prune_matrix
from prunelab.methods.wanda.method import Wanda, cumulative_mask
from tests.contract.references import language_model, token_ids

fast = settings(max_examples=40, deadline=None)


@fast
@given(rows=st.integers(1, 5), columns=st.integers(1, 40), ratio=st.floats(0, 1), levels=st.integers(1, 50))
def test_row_masks_are_those_of_a_stable_sort(rows, columns, ratio, levels):
    g = torch.Generator().manual_seed(columns)
    scores = torch.randint(levels, (rows, columns), generator=g).float()  # many ties
    budget = Budget(ratio)
    want = torch.ones(rows, columns, dtype=torch.bool)
    want.scatter_(1, scores.argsort(dim=1, stable=True)[:, : budget.pruned(columns)], False)
    assert torch.equal(masks.per_row(scores, budget), want)


@fast
@given(rows=st.integers(1, 4), groups=st.integers(1, 6), every=st.integers(1, 8), data=st.data())
def test_patterns_keep_the_best_of_each_group(rows, groups, every, data):
    kept = data.draw(st.integers(0, every))
    scores = torch.randn(rows, groups * every, generator=torch.Generator().manual_seed(groups))
    mask = masks.per_row(scores, Budget(kept, "pattern", every)).unflatten(1, (groups, every))
    assert bool((mask.sum(-1) == kept).all())
    parts = scores.unflatten(1, (groups, every))
    worst = parts.masked_fill(~mask, float("inf")).amin(-1)
    assert bool((parts.masked_fill(mask, float("-inf")).amax(-1) <= worst).all())


def test_matrix_masks_prune_one_more_than_the_amount():
    scores = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).abs()
    assert int((~masks.per_matrix(scores, Budget(0.5))).sum()) == 31
    assert bool(masks.per_matrix(scores, Budget(1.0)).all())
    assert not bool(masks.per_matrix(scores, Budget(0.0)).any())


def test_magnitude_over_the_whole_model_uses_one_threshold():
    model, dense = language_model(), language_model()
    plan = prune(Magnitude(group="model"), model, 0.5, progress=False)
    kept = [dense.get_parameter(f"{t.name}.weight")[d.mask].abs().min() for t, d in plan.decisions()]
    gone = [dense.get_parameter(f"{t.name}.weight")[~d.mask].abs().max() for t, d in plan.decisions()]
    assert max(gone) < min(kept)
    assert plan.report.zeroed == plan.report.prunable // 2 + 1


def test_the_variant_of_wanda_meets_its_budget_within_a_thousandth():
    scores = torch.rand(64, 200, generator=torch.Generator().manual_seed(0)) ** 3
    for ratio in (0.4, 0.5, 0.7):
        kept = cumulative_mask(scores, Budget(ratio))
        assert abs(float(kept.float().mean()) - ratio) < 0.01
        assert len(set(kept.sum(1).tolist())) > 1, "rows differ"


def case(rows: int = 5, columns: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(60, columns, generator=g).double()
    x[:, 1] += x[:, 0]  # correlated inputs, so that updates matter
    return torch.randn(rows, columns, generator=g).double(), x.T @ x


def surgery(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """Column by column by the textbook: for each pruned weight the best update of the columns not yet passed, from the
    inverse Hessian of exactly these."""
    weight = weight.clone()
    for i in range(weight.shape[1]):
        inverse = hessian[i:, i:].inverse()
        error = weight[:, i].masked_fill(kept[:, i], 0)
        weight[:, i:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return weight


@pytest.mark.parametrize("width", [1, 4, 5, 12, 128])
@pytest.mark.parametrize("budget", ["0.5", "2:4"])
def test_sparsegpt_is_exact_surgery_for_its_mask(width, budget):
    if budget == "2:4" and width % 4:
        return
    weight, hessian = case()
    kept, updated = prune_matrix(weight, inverse_factor(hessian, 0.0), Budget.parse(budget), width)
    assert torch.allclose(updated, surgery(weight, hessian, kept), atol=1e-9)
    assert not bool(updated[~kept].any()) and bool(updated[kept].any())


def test_one_pruned_column_gives_the_least_squares_optimum():
    weight, hessian = case()
    factor = inverse_factor(hessian, 0.0)
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[:, 0] = False
    best = torch.linalg.solve(hessian[1:, 1:], hessian[1:] @ weight.T).T  # argmin ||(W - V) X|| with V_0 = 0
    errors = weight[:, 0] / factor[0, 0]
    updated = weight - torch.outer(errors, factor[0])
    assert torch.allclose(updated[:, 1:], best, atol=1e-9)


def test_reconstruction_beats_masking_and_stays_above_the_optimum():
    def error(w: Tensor) -> float:
        return float(torch.einsum("ri,ij,rj->", weight - w, hessian, weight - w))

    for seed in range(5):
        weight, hessian = case(seed=seed)
        kept, updated = prune_matrix(weight, inverse_factor(hessian, 0.0), Budget(0.5), 4)
        best = torch.zeros_like(weight)
        for row in range(len(weight)):
            k = kept[row]
            best[row, k] = torch.linalg.solve(hessian[k][:, k], hessian[k] @ weight[row])
        assert error(best) <= error(updated) < error(weight * kept)


def test_dead_channels_are_pruned_and_damping_saves_a_singular_hessian():
    hessian = torch.zeros(4, 4)
    hessian[0, 0] = 2.0
    assert bool(torch.isfinite(inverse_factor(hessian, 0.01)).all())
    twins = torch.ones(3, 3)
    with pytest.raises(PrunelabError, match="singular"):
        inverse_factor(twins, 0.0)
    assert bool(torch.isfinite(inverse_factor(twins, 0.01)).all())
    for wrong in ({"damping": -1.0}, {"width": 0}):
        with pytest.raises(PrunelabError, match="sparsegpt"):
            SparseGPT(**wrong)


def test_orderings_on_a_layer_with_uneven_inputs():
    """Where input scales differ, Wanda loses less of the output than magnitude, and SparseGPT less than Wanda."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=g) * torch.logspace(-1, 1, 32)
    weight = torch.randn(16, 32, generator=g)
    budget, norms = Budget(0.5), x.square().sum(0)
    mixed = x @ torch.randn(32, 32, generator=g)
    for inputs, order in ((x, 2), (mixed, 3)):
        norms = inputs.square().sum(0)
        kept = [masks.per_row(weight.abs(), budget), masks.per_row(weight.abs() * norms.sqrt(), budget)]
        pruned = [weight * m for m in kept]
        pruned.append(prune_matrix(weight, inverse_factor(inputs.T @ inputs, 0.01), budget, 128)[1])
        errors = [float(((weight - w) @ inputs.T).square().sum()) for w in pruned]
        assert errors[1] <= errors[0]
        assert order == 2 or errors[2] < errors[1]


class Seen:
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


def test_statistics_over_sequences_of_any_length():
    g = torch.Generator().manual_seed(0)
    sequences = [torch.randn(n, 6, generator=g) for n in (5, 1, 0, 9)]
    for make, want in (
        (InputNorm, torch.stack([s.square().sum(0) for s in sequences]).mean(0)),
        (InputMean, torch.stack([s.sum(0) / max(len(s), 1) for s in sequences]).mean(0)),
        (SecondMoment, torch.stack([2 * s.T @ s for s in sequences]).mean(0)),
    ):
        accumulator = make(None)
        for s in sequences:
            accumulator.update(Seen(s))
        assert torch.allclose(accumulator.value(), want, atol=1e-5), make
    first = Fluctuation(None)
    first.update(Seen(sequences[0]))
    assert not bool(first.value().any()), "the first sequence is skipped"
    first.update(Seen(sequences[3]))
    around = (sequences[0].mean(0) + sequences[3].mean(0)) / 2
    assert torch.allclose(first.value(), (sequences[3] - around).square().sum(0) / 2, atol=1e-5)


def test_wanda_prunes_what_the_calibration_set_never_lights():
    model, ids = language_model(), token_ids()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:20] = 0  # 20 channels are always zero
    plan = prune(Wanda(), model, 0.5, ids, progress=False)
    assert not bool(plan.decision("model.layers.0.mlp.down_proj").mask[:, :20].any())
