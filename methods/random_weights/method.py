"""Random pruning under one amount everywhere: the baseline that says what looking at the weights is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Target, Unit, WeightSignals


@dataclass(frozen=True)
class RandomWeights(WeightPruner):
    """Keeps units by lot; `prune(..., seed=...)` starts the draws. A baseline of no paper.

    Parameters
    ----------
    units
        What is drawn: weights of each row, heads, channels, experts, sublayers or layers.
    """

    units: tuple[Unit, ...] = ("linear",)

    name: ClassVar[str] = "random_weights"

    @property
    def sequential(self) -> bool:
        return not {"layers", "sublayers"} & set(self.units)  # these are compared across the model

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        drawn = torch.rand(target.shape, generator=signals.rng)
        return drawn.to(next(iter(signals.weights.values())).device) if signals.weights else drawn
