"""The comparison groups of weight pruning: which of the scores stay. Masks are True where a weight stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


class Leaving(Sequence[Tensor]):
    """Masks of several targets of which the `gone` smallest scores of all have left, earlier ones first where scores
    are equal; each is made when it is asked for. scores: read one at a time, so that those on disk stay there."""

    def __init__(self, scores: Sequence[Tensor], gone: int) -> None:
        self.scores, self.gone, self.threshold, self.ties = scores, gone, 0, [0] * len(scores)
        if not gone:
            return
        below = self._find(gone)
        for place, score in enumerate(scores):  # how many of those at the threshold each loses
            self.ties[place] = min(gone - below, int((_ordered(score) == self.threshold).sum()))
            below += self.ties[place]

    def _find(self, gone: int) -> int:
        """Set the threshold to the `gone`-th smallest score, eight bits at a time; how many lie below it."""
        prefix, below = 0, 0
        for shift in (24, 16, 8, 0):
            counts = torch.zeros(256, dtype=torch.int64)
            for score in self.scores:
                keys = _ordered(score).long() + 2**31
                here = keys[(keys >> (shift + 8)) == prefix] >> shift & 255
                counts += torch.bincount(here, minlength=256).cpu()
            passed = counts.cumsum(0) + below
            digit = int(torch.searchsorted(passed, gone))
            below = int(passed[digit - 1]) if digit else below
            prefix = prefix << 8 | digit
        self.threshold = prefix - 2**31
        return below

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, place: Any) -> Any:
        score = self.scores[place]
        if not self.gone:
            return torch.ones_like(score, dtype=torch.bool)
        keys = _ordered(score)
        tied = keys == self.threshold
        leaves = (keys < self.threshold) | (tied & (tied.cumsum(0, dtype=torch.int32) <= self.ties[place]))
        return ~leaves.view(score.shape)


def _ordered(scores: Tensor) -> Tensor:
    """Whole numbers [n] in the order of scores, int32."""
    bits = (scores.float().flatten() + 0.0).view(torch.int32)  # zeros have one sign
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


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
