"""SparseGPT (Frantar & Alistarh, ICML 2023): prune column by column, and let the columns to the right make up for it.

One Hessian H = 2 X X^T / samples serves all rows of a layer: with the upper Cholesky factor U of its inverse, the
optimal update of the remaining columns after pruning column i is the row U[i, i:] times the error (W_i - Q_i) / U_ii.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputNorm, SecondMoment
from prunelab.common.weights.targets import Accumulator, Decision, Kind, Target, WeightSignals


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor [C, C] of the inverse of the damped Hessian. Channels never used count as independent."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not bool(failed):
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if bool(failed) or not bool(torch.isfinite(factor).all()):
        raise PrunelabError("a Hessian is singular; give more calibration data or raise sparsegpt's damping")
    return factor


def prune_matrix(weight: Tensor, factor: Tensor, budget: Budget, width: int) -> tuple[Tensor, Tensor]:
    """Mask and updated weight, both [out, in] (algorithm 1).

    Columns are taken in blocks of `width`. A ratio is met in each block over all of its rows, a pattern in each group
    of columns of a row, where the group is chosen when its first column is reached, on weights updated until then.
    """
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, local = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        diagonal = local.diagonal()
        errors = torch.zeros_like(block)
        stays = kept[:, start:stop]
        if budget.unit == "ratio":
            stays.copy_(masks.per_matrix(block.square() / diagonal.square(), budget))
        for i in range(stop - start):
            if budget.unit == "pattern" and i % budget.every == 0:
                group = slice(i, i + budget.every)
                stays[:, group] = masks.per_row(block[:, group].square() / diagonal[group].square(), budget)
            errors[:, i] = block[:, i].masked_fill(stays[:, i], 0) / diagonal[i]
            block[:, i:] -= torch.outer(errors[:, i], local[i, i:])
        weight[:, start:stop] = block
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return kept, weight.masked_fill_(~kept, 0)


class InverseFactor(SecondMoment):
    """The factor of the Hessian of a layer's inputs, made once for all layers that read them."""

    def __init__(self, target: Target, damping: float) -> None:
        super().__init__(target)
        self.damping = damping

    def value(self) -> Tensor:
        return inverse_factor(self.state, self.damping)


@dataclass(frozen=True)
class SparseGPT(WeightPruner):
    """One-shot pruning with weight reconstruction, in ratios or patterns.

    damping: share of the Hessian's mean diagonal added to it. width: columns updated lazily together (128).
    """

    damping: float = 0.01
    width: int = 128

    name: ClassVar[str] = "sparsegpt"
    exempt = {"budget": "the weight at each block's threshold goes too, as released: one more a block of columns"}

    def __post_init__(self) -> None:
        if self.damping < 0 or self.width < 1:
            raise PrunelabError("sparsegpt: damping must be at least 0 and width at least 1")

    def statistics(self, kind: Kind) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"inverse_factor": lambda target: InverseFactor(target, self.damping), "input_norm": InputNorm}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """w^2 / U_ii^2, the error of removing a weight before any other is touched."""
        return signals.weight.float().square() / signals["inverse_factor"].diagonal().square()

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        if budget.unit not in ("ratio", "pattern") or (budget.every and self.width % budget.every):
            raise PrunelabError(f"sparsegpt prunes ratios, or patterns that divide {self.width} columns, not {budget}")
        weight = signals.weight.float().masked_fill(signals["input_norm"] == 0, 0)  # channels never used
        kept, updated = prune_matrix(weight, signals["inverse_factor"], budget, self.width)
        return Decision(kept, {"weight": updated})
