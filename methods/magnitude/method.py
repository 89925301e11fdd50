"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Target, WeightSignals


@dataclass(frozen=True)
class Magnitude(WeightPruner):
    """Keeps the weights of largest absolute value (arXiv 1506.02626).

    Parameters
    ----------
    group
        What is compared: all weights of a `matrix` (as in the baselines of Wanda and SparseGPT), those of one output
        (`row`), or those of the whole `model`.
    """

    group: Literal["matrix", "row", "model"] = "matrix"

    name: ClassVar[str] = "magnitude"
    exempt = {"budget": "the weight at the threshold goes too, as released: one more than the budget says"}

    @property
    def sequential(self) -> bool:
        return self.group != "model"

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals.weight.abs()

    def mask(self, target: Target, scores: Tensor, budget: Budget) -> Tensor:
        return masks.per_row(scores, budget) if self.group == "row" else masks.per_matrix(scores, budget)

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        if budget.unit == "pattern":  # a pattern has groups of its own
            return super().select(targets, signals, scores, budget)
        kept = masks.per_matrix(torch.cat([score.flatten() for score in scores]), budget)
        parts = kept.split([target.units for target in targets])
        return [part.view(target.shape) for part, target in zip(parts, targets, strict=True)]
