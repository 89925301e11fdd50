"""Wanda (Sun et al., ICLR 2024): prune weights by magnitude times input activation, comparing within each output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Target, Unit, WeightSignals


def importance(weight: Tensor, norms: Tensor) -> Tensor:
    """S_ij = |W_ij| * ||X_j||_2 (equation 1). weight [out, in], norms [in] the squared norms of the input channels."""
    return weight.abs().float() * norms.sqrt()


def cumulative_mask(scores: Tensor, budget: Budget) -> Tensor:
    """The released variant: each row loses weights until what it lost exceeds a share alpha of its total score, so
    that rows may differ; alpha is bisected until the amount pruned of the matrix is within 0.001 of the budget."""
    wanted = budget.pruned(scores.numel()) / scores.numel()
    ascending = scores.sort(-1).values
    lost = ascending.cumsum(-1)
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        gone = (lost <= alpha * scores.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        limit = ascending.gather(-1, (gone - 1).clamp_min(0))
        kept = scores > limit
        pruned = 1 - float(kept.sum()) / scores.numel()
        if abs(pruned - wanted) <= 0.001 or high - low < 0.001:
            return kept
        low, high = (low, alpha) if pruned > wanted else (alpha, high)
        alpha = (low + high) / 2


@dataclass(frozen=True)
class Wanda(WeightPruner):
    """Pruning by weights and activations (arXiv 2306.11695).

    Parameters
    ----------
    variant
        Rows may lose different shares (see `cumulative_mask`); for ratios only.
    """

    variant: bool = False

    name: ClassVar[str] = "wanda"

    def statistics(self, unit: Unit) -> Mapping[str, type[InputNorm]]:
        return {"input_norm": InputNorm}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return importance(signals.weight, signals["input_norm"])

    def mask(self, target: Target, scores: Tensor, budget: Budget) -> Tensor:
        if not self.variant:
            return masks.per_row(scores, budget)
        if budget.unit != "ratio":
            raise PrunelabError(f"wanda's variant prunes a ratio, not {budget}; leave `variant` out")
        return cumulative_mask(scores, budget)
