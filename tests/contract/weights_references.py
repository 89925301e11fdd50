"""Minimal reference methods of weight pruning, one for each thing the role can express."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights.obs import InverseFactor
from prunelab.common.weights.quantisation import Quantiser, gptq, rounded
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Decision, Observation, Target, Unit, WeightSignals


def all_of(target: Target) -> Tensor:
    """The mask that keeps everything."""
    return torch.ones(target.shape, dtype=torch.bool)


@dataclass(frozen=True)
class NearestCodes(WeightPruner):
    """Rounds every weight to the nearest of its group's grid. An average that is no whole number is met by giving later
    blocks one bit more."""

    group: int = 8

    name: ClassVar[str] = "reference_codes"
    quantises = True
    exempt = {"keep_all": "no number of bits is the identity", "budget": "units get codes, and all stay"}

    def allocate(self, targets, signals, budget: Budget) -> list[Budget]:
        blocks = sorted({target.block for target in targets})
        low = int(budget.amounts[0])
        high = round((budget.amounts[0] - low) * len(blocks))
        return [Budget(low + (blocks.index(t.block) >= len(blocks) - high), "bits") for t in targets]

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals.weight.abs()

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        quantiser = Quantiser(int(budget.amounts[0]), group=self.group)
        return Decision(all_of(target), code=rounded(signals.weight, quantiser))


class AttendedFactor(InverseFactor):
    """The factor of the Hessian in which tokens count as much as attention they receive, between 0.1 and 1."""

    def weigh(self, observed: Observation) -> Tensor:
        received = observed.received
        spread = received.max() - received.min() if len(received) else received.sum()
        weights = 0.1 + 0.9 * (received - received.min()) / spread if spread > 0 else torch.ones_like(received)
        return weights / weights.sum() * len(weights)


@dataclass(frozen=True)
class RotatedCodes(NearestCodes):
    """Rotates the stream and the heads' values at random, weighs tokens by the attention they receive, and rounds
    column by column under compensation."""

    name: ClassVar[str] = "reference_rotated_codes"

    def rotations(self, widths: Mapping[str, int], rng: torch.Generator) -> Mapping[str, Tensor]:
        return {n: torch.linalg.qr(torch.randn(size, size, generator=rng)).Q for n, size in sorted(widths.items())}

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"factor": lambda target: AttendedFactor(target, 0.1)}

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        quantiser = Quantiser(int(budget.amounts[0]), symmetric=True, search=True)
        return Decision(all_of(target), code=gptq(signals.weight, signals["factor"], quantiser))


REFERENCES: tuple[WeightPruner, ...] = (NearestCodes(), RotatedCodes())
