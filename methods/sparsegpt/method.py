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
from prunelab.common.core.options import NonNegativeFloat, PositiveInt
from prunelab.common.weights import masks
from prunelab.common.weights.obs import inverse_factors, sweep
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Accumulator, Decision, Target, Unit, WeightSignals


@dataclass
class Pruned:
    """Columns of which some weights become zero (`kept` False). A ratio is met in each block over all of its rows, a
    pattern in each group of columns of a row, where the group is chosen when its first column is reached, on weights
    updated until then."""

    budget: Budget
    kept: Tensor

    def enter(self, columns: slice, weight: Tensor, diagonal: Tensor) -> None:
        if self.budget.unit == "ratio":
            self.kept[:, columns] = masks.per_matrix(weight[:, columns].square() / diagonal.square(), self.budget)

    def settle(self, column: int, block: Tensor, diagonal: Tensor, at: int) -> Tensor:
        if self.budget.unit == "pattern" and at % self.budget.every == 0:
            group, last = slice(at, at + self.budget.every), column + self.budget.every
            scores = block[:, group].square() / diagonal[group].square()
            self.kept[:, column:last] = masks.per_row(scores, self.budget)
        return block[:, at].masked_fill(~self.kept[:, column], 0)


def prune_matrix(weight: Tensor, factor: Tensor, budget: Budget, width: int) -> tuple[Tensor, Tensor]:
    """Mask and updated weight, both [out, in] (algorithm 1), with columns taken in blocks of `width`."""
    pruned = Pruned(budget, torch.ones_like(weight, dtype=torch.bool))
    return pruned.kept, sweep(weight, factor, width, pruned)


@dataclass(frozen=True)
class SparseGPT(WeightPruner):
    """One-shot pruning with weight reconstruction, in ratios or patterns (arXiv 2301.00774).

    Parameters
    ----------
    damping
        Share of the Hessian's mean diagonal added to it.
    width
        Columns updated lazily together (128).
    """

    damping: NonNegativeFloat = 0.01
    width: PositiveInt = 128

    name: ClassVar[str] = "sparsegpt"
    exempt = {"budget": "the weight at each block's threshold goes too, as released: one more a block of columns"}

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"inverse_factor": inverse_factors(self.damping), "input_norm": InputNorm}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """w^2 / U_ii^2, the error of removing a weight before any other is touched."""
        return signals.weight.float().square() / signals["inverse_factor"].diagonal().square()

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        if budget.unit not in ("ratio", "pattern") or (budget.every and self.width % budget.every):
            raise PrunelabError(f"sparsegpt prunes ratios, or patterns that divide {self.width} columns, not {budget}")
        weight = signals.weight.float().masked_fill(signals["input_norm"] == 0, 0)  # channels never used
        kept, updated = prune_matrix(weight, signals["inverse_factor"], budget, self.width)
        return Decision(kept, {"weight": updated})
