"""SparseGPT (Frantar & Alistarh, ICML 2023): prune column by column, and let the columns to the right make up for it.

One Hessian H = 2 X X^T / samples serves all rows of a layer: with the upper Cholesky factor U of its inverse, the
optimal update of the remaining columns after pruning column i is the row U[i, i:] times the error (W_i - Q_i) / U_ii.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveInt
from prunelab.common.weights.obs import inverse_factors, prune_matrix
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Accumulator, Decision, Target, Unit, WeightSignals


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
