"""The comparison groups of weight pruning: which of the scores stay. Masks are True where a weight stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError


def per_row(scores: Tensor, budget: Budget) -> Tensor:
    """The best of each row of scores [..., n]; of a pattern, the best of each group of consecutive columns.

    Of equal scores the earlier goes first, as under the stable ascending sort of the published codes.
    """
    if budget.unit == "pattern":
        budget.count(scores.shape[-1])
        groups = scores.unflatten(-1, (-1, budget.every))
        return _without_smallest(groups, budget.every - int(budget.amounts[0])).flatten(-2)
    return _without_smallest(scores, budget.pruned(scores.shape[-1]))


def per_matrix(scores: Tensor, budget: Budget) -> Tensor:
    """The best of the whole matrix: what lies above the threshold at the sorted place of the amount to prune.

    As published, the element at the threshold goes too, so that one more than the amount is pruned (and more where
    scores tie there). A pattern has groups of its own and is masked by row.
    """
    if budget.unit == "pattern":
        return per_row(scores, budget)
    pruned = budget.pruned(scores.numel())
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > scores.flatten().kthvalue(min(pruned + 1, scores.numel())).values


def within(scores: Sequence[Tensor], sizes: Sequence[int], keep: float) -> list[Tensor]:
    """Masks of several targets: the best units stay until they hold the share `keep` of all parameters, and at least
    the best of each target. sizes: parameters of a unit of each."""
    top = [s.scatter(0, s.argmax(0, keepdim=True), torch.inf) for s in scores]
    flat = torch.cat(top)
    each = torch.cat([torch.full_like(s, float(size)) for s, size in zip(scores, sizes, strict=True)])
    order = flat.argsort(descending=True, stable=True)
    held = each[order].double().cumsum(0) <= keep * float(each.double().sum()) * (1 + 1e-9)
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(0, order, held) | flat.isinf()
    return list(mask.split([len(s) for s in scores]))


def refuse_nan(scores: Tensor, name: str) -> None:
    """Stop at scores that are not numbers, since every mask made of them would be chance."""
    if bool(scores.isnan().any()):
        raise PrunelabError(f"the scores of {name} hold NaN; check the weights and the calibration data")


def _without_smallest(scores: Tensor, gone: int) -> Tensor:
    """All but the `gone` smallest of each row, by selection rather than by sorting."""
    if gone == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(gone, dim=-1, keepdim=True).values
    below, tied = scores < threshold, scores == threshold
    place = tied.cumsum(-1, dtype=torch.int32)
    return ~(below | (tied & (place <= gone - below.sum(-1, keepdim=True, dtype=torch.int32))))
