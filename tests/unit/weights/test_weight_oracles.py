"""Methods against brute force: all masks, patterns and subsets of layers small enough to try them all."""

from __future__ import annotations

from itertools import chain, combinations, product

import pytest
import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.weights import masks, prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.obs import inverse_factor
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.flap.method import FLAP
from prunelab.methods.sparsegpt.method import prune_matrix
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import language_model, token_ids

COLUMNS = 8


def layer(seed: int, correlated: bool) -> tuple[Tensor, Tensor]:
    """A weight [3, 8] and inputs [64, 8] of uneven scale whose channels are orthogonal unless they are correlated."""
    g = torch.Generator().manual_seed(seed)
    x = torch.linalg.qr(torch.randn(64, COLUMNS, generator=g).double()).Q
    x = x * torch.rand(COLUMNS, generator=g).double().mul(3).add(0.1)
    if correlated:
        x = x @ torch.randn(COLUMNS, COLUMNS, generator=g).double()
    return torch.randn(3, COLUMNS, generator=g).double(), x


def errors(weight: Tensor, pruned: Tensor, x: Tensor) -> Tensor:
    """Squared error of each output [out]."""
    return ((weight - pruned) @ x.T).square().sum(1)


def row_masks(gone: int) -> Tensor:
    """All masks [n, 8] of one row that prune so many weights."""
    found = torch.ones(0, COLUMNS, dtype=torch.bool)
    for places in combinations(range(COLUMNS), gone):
        found = torch.cat([found, torch.ones(1, COLUMNS, dtype=torch.bool).index_fill(1, torch.tensor(places), False)])
    return found


def pattern_masks(kept: int, every: int) -> Tensor:
    """All masks [n, 8] of one row of a pattern."""
    group = [[i in places for i in range(every)] for places in combinations(range(every), kept)]
    return torch.tensor([[*chain(*parts)] for parts in product(group, repeat=COLUMNS // every)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("budget", "candidates"),
    [("0.5", row_masks(4)), ("0.25", row_masks(6)), ("2:4", pattern_masks(2, 4)), ("1:2", pattern_masks(1, 2))],
)
def test_wanda_is_the_best_mask_of_each_output_where_channels_are_orthogonal(seed, budget, candidates):
    weight, x = layer(seed, correlated=False)
    target = Target("linear", "w", 0, "w", tuple(weight.shape))
    signals = WeightSignals({"weight": weight}, {"input_norm": x.square().sum(0)})
    decision = Wanda().solve(target, signals, Budget.parse(budget))
    best = torch.stack([errors(weight, weight * mask, x) for mask in candidates]).amin(0)
    assert torch.allclose(errors(weight, weight * decision.mask, x), best, rtol=1e-6)
    assert all(bool((candidates == row).all(1).any()) for row in decision.mask), "of the shape asked for"


@pytest.mark.parametrize(("kept", "every"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
def test_patterns_keep_the_largest_sum_of_scores_of_all_that_fit(kept, every):
    scores = torch.rand(5, COLUMNS, generator=torch.Generator().manual_seed(every)).double()
    mask = masks.per_row(scores, Budget(kept, "pattern", every))
    sums = pattern_masks(kept, every).double() @ scores.T
    assert torch.allclose((scores * mask).sum(1), sums.amax(0))


@pytest.mark.parametrize("column", range(COLUMNS))
def test_sparsegpts_score_is_what_removing_a_weight_costs_at_best(column):
    """Set one weight to zero and refit the columns after it by least squares, those before it fixed."""
    weight, x = layer(0, correlated=True)
    factor = inverse_factor(x.T @ x, 0.0)
    rest = x[:, column + 1 :]
    for row in range(len(weight)):
        lost = weight[row, column] * x[:, column]
        refit = rest @ torch.linalg.lstsq(rest, lost[:, None]).solution if rest.shape[1] else torch.zeros(len(x), 1)
        cost = (lost - refit[:, 0]).square().sum()
        assert float(weight[row, column] ** 2 / factor[column, column] ** 2) == pytest.approx(float(cost), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", ["0.5", "2:4"])
def test_no_mask_with_its_best_weights_is_beaten_by_sparsegpt(seed, budget):
    """The best of all masks bounds its own mask refitted, which bounds what it gives: later columns alone make up."""
    weight, x = layer(seed, correlated=True)
    hessian = x.T @ x
    kept, updated = prune_matrix(weight, inverse_factor(hessian, 0.0), Budget.parse(budget), 4)
    ours = errors(weight, updated, x)
    for row in range(len(weight)):
        gone = COLUMNS - int(kept[row].sum())
        candidates = row_masks(gone) if budget == "0.5" else pattern_masks(2, 4)
        best = min(float(errors(weight[row : row + 1], refitted(weight[row], hessian, m), x)) for m in candidates)
        exact = float(errors(weight[row : row + 1], refitted(weight[row], hessian, kept[row]), x))
        assert best <= exact * (1 + 1e-9) and exact <= float(ours[row]) * (1 + 1e-9)


def refitted(row: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The best weights [1, 8] of one output for its mask."""
    best = torch.zeros(1, COLUMNS, dtype=row.dtype)
    if bool(kept.any()):
        best[0, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ row)
    return best


@pytest.mark.parametrize("ratio", [0.85, 0.7, 0.5, 0.35])
def test_flap_keeps_the_set_nearest_the_budget_of_all_sets_that_go_by_score(ratio):
    """Every subset of a layer's heads and neurons is tried. Those that lose no unit above one they keep are what a
    common threshold can leave; of them, the one whose parameters come nearest the budget."""
    sizes = {"num_hidden_layers": 1, "intermediate_size": 6}
    model, dense, ids = language_model("llama_mha", **sizes), language_model("llama_mha", **sizes), token_ids(6)
    plan = prune(FLAP(released=False), model, ratio, ids, progress=False)
    scores, costs = [], []
    block = dense.model.layers[0]
    for linear, units, size in ((block.self_attn.o_proj, 4, 4 * 8 * 32), (block.mlp.down_proj, 6, 3 * 32)):
        x = inputs(dense, linear, ids)
        importance = x.var(0) * linear.weight.detach().square().sum(0)
        importance = (importance - importance.mean()) / importance.std()
        scores += importance.view(units, -1).mean(1).tolist()
        costs += [size] * units
    nearest: tuple[float, list[bool]] = (float("inf"), [])
    for kept in product([False, True], repeat=len(scores)):
        above = min((s for s, stays in zip(scores, kept, strict=True) if stays), default=float("inf"))
        if max((s for s, stays in zip(scores, kept, strict=True) if not stays), default=-float("inf")) < above:
            cost = sum(c for c, stays in zip(costs, kept, strict=True) if stays)
            nearest = min(nearest, (abs(cost - ratio * sum(costs)), list(kept)))
    assert [*chain(*(plan.decision(t).mask.tolist() for t in plan.targets))] == nearest[1]


@torch.no_grad()
def inputs(model: nn.Module, linear: nn.Module, ids: Tensor) -> Tensor:
    """What a linear reads [tokens, C] of a calibration set."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    model(ids)
    handle.remove()
    return seen[0]


def test_flap_counts_parameters_as_the_adapter_does():
    targets = [weight_adapter(language_model("llama_mha")).targets(unit)[0] for unit in ("heads", "channels")]
    assert [target.size for target in targets] == [4 * 8 * 32, 3 * 32]
