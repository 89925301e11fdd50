"""Pruning by explaining (Yeom et al., Pattern Recognition 2021): remove the filters that explain the answer least.

Layer-wise relevance propagation traces the output of the true class back through the network. What arrives at a
filter, summed over reference samples and relative to its layer, is how much the filter matters; the least relevant of
all layers leave, a few at a time. Weight, gradient and Taylor criteria are judged in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, PositiveInt, PositiveShare
from prunelab.common.weights import masks
from prunelab.common.weights.relevance import Rule, RuleName, Start
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.rounds import Rounds
from prunelab.common.weights.targets import Accumulator, Flow, Probe, Statistics, Target, Unit, WeightSignals

Criterion = Literal["lrp", "taylor", "gradient", "weight"]


def contribution(criterion: Criterion, outputs: Tensor, back: Tensor, absolute: bool = False) -> Tensor:
    """What a batch says of each unit [C], from outputs and what flows back to them, both [B, C, places]: the sum of
    relevance (or of its size), the mean gradient, or the mean of output times gradient."""
    if criterion == "lrp":
        return (back.abs() if absolute else back).sum((0, 2))
    return (back if criterion == "gradient" else outputs * back).mean((0, 2))


def weight_size(rows: Tensor) -> Tensor:
    """L1 norm [C] of the weights [C, n] that make a unit."""
    return rows.abs().sum(1)


def normalised(criterion: Criterion, raw: Tensor, relative: bool = True) -> Tensor:
    """Scores [C] relative to their layer: divided by their sum, or their sizes divided by their L2 norm. Without
    `relative` they are not divided, but for relevance, which as released always is. A layer of nothing but zeros stays
    what it is."""
    raw = raw if criterion in ("lrp", "weight") else raw.abs()
    whole = raw.sum() if criterion in ("lrp", "weight") else raw.norm()
    return raw / whole if bool(whole != 0) and (relative or criterion == "lrp") else raw


def least(scores: Sequence[Tensor], count: int) -> list[tuple[int, int]]:
    """The `count` units of all layers with the smallest scores, as (layer, unit), smallest first; of equal ones those
    of earlier layers, and earlier units."""
    order = torch.cat(list(scores)).argsort(stable=True)[:count]
    starts = torch.tensor([0, *(len(s) for s in scores)]).cumsum(0)
    layers = torch.searchsorted(starts, order.cpu(), right=True) - 1
    return list(zip(layers.tolist(), (order.cpu() - starts[layers]).tolist(), strict=True))


class Gathered(Accumulator):
    """Contributions of batches, summed."""

    def __init__(self, criterion: Criterion, absolute: bool) -> None:
        self.criterion, self.absolute = criterion, absolute
        self.state = torch.zeros(())

    def update(self, observed: Flow) -> None:
        result = contribution(self.criterion, observed.outputs.float(), observed.back.float(), self.absolute)
        self.state = self.state.to(result.device) + result

    def value(self) -> Tensor:
        return self.state


@dataclass(frozen=True)
class PruningByExplaining(WeightPruner):
    """Filter pruning by layer-wise relevance, in rounds, with or without fine-tuning (arXiv 1912.08881).

    Calibrate with pairs of inputs and labels; `prune(..., tune=...)` trains after every round. The budget is the share
    of all layers' filters together.

    Parameters
    ----------
    criterion
        `lrp`, or what the paper compares it with: `taylor`, `gradient`, `weight`.
    step
        Share of the unpruned network's filters that a round takes (0.05); 1 takes all at once.
    normalise
        Judge filters relative to their layer.
    start
        Relevance begins with `one`, or with the true class's `logit`, as in the paper's toy experiments.
    rule, first_rule
        How layers share relevance out (see `Rule`), and the first one if it does so differently.
    alpha, low, high
        Of the rules: how often `alphabeta` counts what positive weights give, and between what inputs lie for `zB`.
    absolute
        Sum sizes of relevance, as the authors' code does for ResNets.
    batch
        Samples that go through the network together. Batches are summed, as released, so that means of gradients
        depend on it.
    spare
        Layers to leave whole, as patterns of their paths: the authors' VGG keeps its classifier (`classifier.*`).
    """

    criterion: Criterion = "lrp"
    step: PositiveShare = 0.05
    normalise: bool = True
    start: Start = "one"
    rule: RuleName = "z+"
    first_rule: RuleName | None = None
    alpha: FiniteFloat = 2.0
    low: FiniteFloat = -1.0
    high: FiniteFloat = 1.0
    absolute: bool = False
    batch: PositiveInt = 128
    spare: tuple[str, ...] = ()

    name: ClassVar[str] = "pruning_by_explaining"
    traces = True
    exempt = {"budget": "filters of all layers are compared, and the layers keep different shares"}

    @property
    def sequential(self) -> bool:
        return False

    @property
    def units(self) -> Sequence[Unit]:
        return ("channels",)

    @property
    def rounds(self) -> Rounds:
        return Rounds(step=self.step)

    def covers(self, target: Target) -> bool:
        return not any(fnmatchcase(target.name, pattern) for pattern in self.spare)

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        if self.criterion == "weight":
            return {}
        rule, first = None, None
        if self.criterion == "lrp":
            rule = Rule(self.rule, self.alpha, self.low, self.high)
            first = None if self.first_rule is None else Rule(self.first_rule, self.alpha, self.low, self.high)
        gathered = {"raw": lambda target: Gathered(self.criterion, self.absolute)}
        return probe.relevance(gathered, rule, first, self.start, batch=self.batch)

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """Of filters that several layers make together, as behind a residual sum, the layers' scores add up."""
        results = [signals[name] for name in sorted(signals.statistics)]
        results = results or [weight_size(signals.weights["up"].float())]
        if signals.alive is not None:  # what has left says nothing of its layer
            results = [raw * signals.alive.to(raw.device) for raw in results]
        return torch.stack([normalised(self.criterion, raw, self.normalise) for raw in results]).sum(0)

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        """The best of all layers; the best of each stays, which the released code leaves to chance."""
        if len(budget.amounts) > 1:
            raise PrunelabError(f"pruning_by_explaining prunes one share of all layers together, not {budget}")
        joined = [s.index_fill(0, s.argmax(), torch.inf) for s in scores]
        return masks.per_row(torch.cat(joined), budget).split([target.units for target in targets])
