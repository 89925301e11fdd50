"""Minimal reference methods of weight pruning, one for each thing the role can express."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.evolution import Genes, Stage, evolved, exchanged
from prunelab.common.weights import masks
from prunelab.common.weights.obs import InverseFactor
from prunelab.common.weights.quantisation import Quantiser, gptq, rounded
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.rounds import Rounds
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import (
    Accumulator,
    Decision,
    Observation,
    Probe,
    Statistics,
    Target,
    Unit,
    WeightSignals,
)


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


@dataclass(frozen=True)
class RoundedMagnitude(WeightPruner):
    """Takes a third of the channels that are to go at a time, by the norm of what reads them, and looks again."""

    name: ClassVar[str] = "reference_rounds"

    @property
    def units(self) -> tuple[Unit, ...]:
        return ("channels",)

    @property
    def rounds(self) -> Rounds:
        return Rounds(3)

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"input_norm": InputNorm}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals.weights["down"].float().norm(dim=0) * signals["input_norm"].sqrt()


@dataclass(frozen=True)
class SearchedChannels(WeightPruner):
    """Silences channels of each block at one of three levels around the budget, so chosen that the sum of all levels is
    zero and the loss least: an evolution over candidates, each tried on the whole model."""

    step: int = 4  # channels from one level to the next
    generations: int = 2

    name: ClassVar[str] = "reference_search"
    exempt = {"budget": "blocks keep different numbers"}

    @property
    def units(self) -> tuple[Unit, ...]:
        return ("channels",)

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"input_norm": InputNorm}

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        names = [target.name for target in probe.targets]
        levels = {t.name: self.levels(t, probe.budget) for t in probe.targets}
        found = probe.candidates(levels, self.decided, {"channels": {"input_norm": InputNorm}}, dict.fromkeys(names, 1))

        def cost(genes: Genes, effort: int) -> float:
            with probe.trial(found.decisions(dict(zip(names, genes, strict=True)))):
                return sum(float(probe.loss(sample)) for sample in probe.samples[:effort])

        low, high = [0] * len(names), [2] * len(names)
        best = evolved(
            (1,) * len(names), lambda genes, rng: exchanged(genes, rng, low, high), cost,
            [Stage(1, 2), Stage(len(probe.samples), 1)], self.generations, offspring=3,
        )  # fmt: skip
        return {name: {"level": torch.tensor(level)} for name, level in zip(names, best, strict=True)}

    def levels(self, target: Target, budget: Budget) -> list[Budget]:
        gone = budget.at(target.block).pruned(target.units)
        return [Budget(min(max(gone + d, 0), target.units - 1), "removed") for d in (self.step, 0, -self.step)]

    def allocate(self, targets, signals, budget: Budget) -> list[Budget]:
        if budget.amounts[0] == 1:
            return [budget for _ in targets]
        return [self.levels(t, budget)[int(s["level"])] for t, s in zip(targets, signals, strict=True)]

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals.weights["down"].float().norm(dim=0) * signals["input_norm"].sqrt()

    def decided(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        return Decision(masks.per_row(self.score(target, signals), budget), remove=False)

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        scores = self.score(target, signals)
        masks.refuse_nan(scores, target.name)
        return Decision(masks.per_row(scores, budget), remove=False)


@dataclass(frozen=True)
class LearnedChannels(WeightPruner):
    """Learns one linear map from what makes a channel to how much it matters, on the norms of what reads it, and keeps
    the channels that it ranks first. The map serves every model of the same width."""

    steps: int = 5

    name: ClassVar[str] = "reference_learned"

    @property
    def units(self) -> tuple[Unit, ...]:
        return ("channels",)

    def build(self, info: Sequence[Target]) -> nn.Module:
        channels = info[0]
        return nn.Linear(channels.read, 1)

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        weights = [probe.weights(target) for target in probe.targets]
        if not probe.trained:
            optimiser = torch.optim.SGD(probe.learned.parameters(), lr=0.1)
            for _ in range(self.steps):
                errors = [
                    (probe.learned(w["up"].float()).flatten() - w["down"].float().norm(dim=0)).square().mean()
                    for w in weights
                ]
                optimiser.zero_grad()
                torch.stack(errors).mean().backward()
                optimiser.step()
        with torch.no_grad():
            ranks = [probe.learned(w["up"].float()).flatten() for w in weights]
        return {target.name: {"rank": rank} for target, rank in zip(probe.targets, ranks, strict=True)}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals["rank"]


class MeanSquare(Accumulator):
    """Mean square of gradients, an item on average."""

    def __init__(self, target: Target) -> None:
        self.sum, self.seen = torch.zeros(()), 0

    def update(self, observed: Tensor) -> None:
        self.sum, self.seen = self.sum + observed.float().square(), self.seen + 1

    def value(self) -> Tensor:
        return self.sum / max(self.seen, 1)


@dataclass(frozen=True)
class DomainFisher(WeightPruner):
    """Keeps the weights that matter to the corpus `domain` more than to the corpus `general`, by squared gradients of
    whatever the objective is."""

    name: ClassVar[str] = "reference_corpora"
    corpora = ("domain", "general")

    def covers(self, target: Target) -> bool:
        return ".mlp." in target.name

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        fisher = {c: probe.gradients({c: MeanSquare}, corpus=c, batch=2) for c in ("domain", "general")}
        return {t.name: {**fisher["domain"][t.name], **fisher["general"][t.name]} for t in probe.targets}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        magnitude = signals.weight.float().abs()
        return magnitude * (signals["domain"] - signals["general"]) + magnitude.sqrt()


def triplets(samples: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences of several lengths that belong together."""
    draws = torch.Generator().manual_seed(seed)
    lengths = {"query": 5, "positive": 9, "negative": 7}
    return [{n: torch.randint(61, (size,), generator=draws) for n, size in lengths.items()} for _ in range(samples)]


REFERENCES: tuple[WeightPruner, ...] = (
    NearestCodes(), RotatedCodes(), RoundedMagnitude(), SearchedChannels(), LearnedChannels(), DomainFisher(),
)  # fmt: skip
