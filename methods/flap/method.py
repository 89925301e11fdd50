"""FLAP (An et al., AAAI 2024): remove the heads and neurons whose outputs hardly fluctuate, and put their mean into a
bias. With it the baselines of its tables, Wanda-sp and Mag-sp.

A channel that always says the same can be replaced by a constant. How much it fluctuates around its mean, weighted by
the energy of the weights that read it, is therefore what pruning it costs once the constant is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import Fluctuation, InputAccumulator, InputNorm
from prunelab.common.weights.targets import Accumulator, Observation, Target, Unit, WeightSignals

Metric = Literal["WIFV", "IFV", "WIFN"]
Structure = Literal["AL-AM", "AL-MM", "UL-UM", "UL-MM"]

OUTPUT: Mapping[Unit, str] = {"heads": "o", "channels": "down"}  # the projection that reads the units of a unit


class Variance(InputAccumulator):
    """Sample variance [C] of a channel over all calibration tokens, merged sequence by sequence."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.tokens = 0
        self.squares = torch.zeros(())  # summed squared distances to the mean, which `state` holds

    def take(self, x: Tensor) -> None:
        if len(x) == 0:
            return
        before, self.tokens = self.tokens, self.tokens + len(x)
        around = x.mean(0)
        shift = around - self.state.to(x.device)
        within, between = (x - around).square().sum(0), shift.square() * (before * len(x) / self.tokens)
        self.squares = self.squares.to(x.device) + within + between
        self.state = self.state.to(x.device) + shift * (len(x) / self.tokens)

    def value(self) -> Tensor:
        # assumption: the paper's samples are the tokens of all sequences.
        return self.squares / max(self.tokens - 1, 1)


class Means(Accumulator):
    """Mean of what each weight that reads the units is given, over a sequence's tokens and averaged over sequences, one
    weight behind the other [n]."""

    def __init__(self, target: Target) -> None:
        self.seen, self.state = 0, torch.zeros(())

    def update(self, observed: Observation) -> None:
        self.seen += 1
        given = [observed.inputs] if observed.read is None else list(observed.given.values())
        mean = torch.cat([x.float().mean(0) if len(x) else x.float().new_zeros(x.shape[1]) for x in given])
        self.state = self.state.to(mean.device) * ((self.seen - 1) / self.seen) + mean / self.seen

    def value(self) -> Tensor:
        return self.state


def importance(metric: Metric, weight: Tensor, statistic: Tensor) -> Tensor:
    """Importance [C] of the input channels of a projection's weight [D, C].

    statistic [C]: the fluctuation of the channels for (W)IFV, their squared norms as Wanda takes them for WIFN.
    """
    weight = weight.float()
    if metric == "WIFN":
        return (weight.abs() * statistic.sqrt()).mean(0)
    return statistic if metric == "IFV" else statistic * weight.square().sum(0)


def standardised(scores: Tensor, name: str) -> Tensor:
    """Scores [C] of one module as distances from their mean in standard deviations, comparable across the model."""
    spread = scores.std()
    if bool(spread == 0):
        raise PrunelabError(f"the channels of {name} all score alike; calibrate on two sequences or more")
    return (scores - scores.mean()) / spread


def common_threshold(scores: Tensor, costs: Tensor, share: float) -> Tensor:
    """The score that all units share as their threshold (AL-AM): down the order of the scores [n], that at which the
    running cost is nearest to `share` of the total cost. Units are those of a whole model: as few tensors as can be."""
    order = scores.argsort(descending=True, stable=True)
    running = costs[order].cumsum_(0)  # in float32 as released, which decides where two lie equally near
    return scores[order[running.sub_(share * running[-1]).abs_().argmin()]]


def above(scores: Tensor, threshold: Tensor, inclusive: bool) -> Tensor:
    """Mask [n] of the units above a threshold; `inclusive` keeps the unit at the threshold too."""
    return scores >= threshold if inclusive else scores > threshold


@dataclass(frozen=True)
class FLAP(WeightPruner):
    """Structured pruning of attention heads and MLP neurons by fluctuation, without retraining (arXiv 2312.11983).

    With grouped queries a unit is a key-value head with all its query heads. The budget is the share that stays of the
    parameters of all heads and neurons.

    Parameters
    ----------
    structure
        `AL-AM` compares heads and neurons of all layers under one threshold; `AL-MM` compares all layers, heads and
        neurons apart; `UL-UM` takes the same share of every layer's heads and neurons; `UL-MM` takes `removed_heads` in
        equal parts from the layers.
    metric
        `WIFV` fluctuation times weight energy, `IFV` fluctuation alone, `WIFN` Wanda's norm.
    removed_heads
        Of the whole model, for the structures in MM; the neurons make up the rest of the budget.
    prunes
        `heads` and `channels`; of convolutional networks, which have no heads, the coupled channels.
    compensate
        Whether the mean of what is removed becomes a bias.
    released
        As the authors' code has it. Otherwise as the paper has it: the fluctuation is the sample variance, heads score
        by it and not by its square, a head counts as many neurons as its parameters make, unrounded, and the unit at
        the common threshold stays.
    """

    structure: Structure = "AL-AM"
    metric: Metric = "WIFV"
    removed_heads: NonNegativeInt = 0
    prunes: tuple[Unit, ...] = ("heads", "channels")
    compensate: bool = True
    released: bool = True

    name: ClassVar[str] = "flap"
    exempt = {"budget": "one threshold for heads and neurons of the whole model: targets lose different shares"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.removed_heads > 0) != self.structure.endswith("MM"):
            raise PrunelabError(f"flap: {self.structure} takes removed_heads={'N' if self._manual else '0'}, N > 0")
        if "channels" not in self.prunes or not {*self.prunes} <= {*OUTPUT} or (self._manual and len(self.prunes) < 2):
            raise PrunelabError(f"flap ({self.structure}) prunes channels, or heads and channels, not {self.prunes}")

    @property
    def _manual(self) -> bool:
        return self.structure.endswith("MM")

    @property
    def _layerwise(self) -> bool:
        return self.structure.startswith("UL")

    @property
    def sequential(self) -> bool:
        return False  # every layer is measured on what the dense layers before it give

    @property
    def units(self) -> Sequence[Unit]:
        return self.prunes

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        fluctuation = Fluctuation if self.released else Variance
        activity: Callable[[Target], Accumulator] = InputNorm if self.metric == "WIFN" else fluctuation
        return {"activity": activity, **({"input_mean": Means} if self.compensate else {})}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        scores = importance(self.metric, signals.weights[OUTPUT[target.unit]], signals["activity"])
        if target.unit == "heads" and self.released:  # assumption: the paper's text has no square
            scores = scores.square()
        # assumption: of a key-value group all channels count alike, whichever query head they belong to.
        if self._layerwise:
            return scores.unflatten(0, (*target.shape, target.span)).sum(-1)
        return standardised(scores, target.name).unflatten(0, (*target.shape, target.span)).mean(-1)

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        if budget.unit != "ratio" or (not self._layerwise and len(budget.amounts) > 1):
            raise PrunelabError(f"flap ({self.structure}) prunes one share of the whole model, not {budget}")
        if self._layerwise:
            return super().select(targets, signals, scores, budget)
        if self._manual:
            return self._apart(targets, scores, budget)
        if budget.amounts[0] == 1:
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        joined = torch.cat(list(scores))
        costs = torch.cat([torch.full(t.shape, cost, device=joined.device) for t, cost in self._costs(targets)])
        threshold = common_threshold(joined, costs, budget.amounts[0])
        return [above(score, threshold, inclusive=not self.released) for score in scores]

    def _costs(self, targets: Sequence[Target]) -> list[tuple[Target, float]]:
        """What a unit of each target costs, in neurons of the first target: 4 d / 3 for a plain head
        of size d. As released this is cut to a whole number (170 for d = 128)."""
        neuron = next(target.size for target in targets if target.unit == "channels")
        costs = [target.size / neuron for target in targets]
        whole = [self.released and target.unit == "heads" for target in targets]
        return [(t, float(int(c)) if cut else c) for t, c, cut in zip(targets, costs, whole, strict=True)]

    def _apart(self, targets: Sequence[Target], scores: Sequence[Tensor], budget: Budget) -> list[Tensor]:
        """AL-MM: the lowest `removed_heads` heads of the model, and the lowest of all its neurons for the rest."""
        results: dict[str, Tensor] = {}
        for unit, gone in (("heads", self.removed_heads), ("channels", self._neurons(targets, budget))):
            of_unit = [(t, s) for t, s in zip(targets, scores, strict=True) if t.unit == unit]
            kept = masks.per_row(torch.cat([s for _, s in of_unit]), Budget(gone, "removed"))
            parts = kept.split([t.units for t, _ in of_unit])
            results |= {t.name: part for (t, _), part in zip(of_unit, parts, strict=True)}
        return [results[target.name] for target in targets]

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        """UL-UM: the same share everywhere. UL-MM: the same number of heads from every layer, and neurons for the
        rest."""
        if not self._manual:
            return super().allocate(targets, signals, budget)
        amounts = []
        for target in targets:
            block = [t for t in targets if t.block == target.block]
            heads = self.removed_heads // sum(t.unit == "heads" for t in targets)
            gone = heads if target.unit == "heads" else self._neurons(block, budget.at(target.block), heads)
            amounts.append(Budget(gone, "removed"))
        return amounts

    def _neurons(self, targets: Sequence[Target], budget: Budget, heads: int | None = None) -> int:
        """Neurons that go with the heads, so that the parameters of both meet the budget."""
        sizes = {target.unit: target.size for target in targets}
        gone = (1 - budget.amounts[0]) * sum(target.parameters for target in targets)
        left = round(gone - (self.removed_heads if heads is None else heads) * sizes["heads"], 6)
        if left < 0:
            raise PrunelabError(
                f"flap: {self.removed_heads} heads are more than the budget {budget} takes; remove fewer heads"
            )
        return int(left / sizes["channels"])

    def update(self, target: Target, signals: WeightSignals, mask: Tensor) -> Mapping[str, Tensor]:
        """The baseline bias: what the removed channels put out on average."""
        if not self.compensate or bool(mask.all()):
            return {}
        role, weights = OUTPUT[target.unit], signals.weights
        several = [name for name in weights if name.startswith(f"{role}.") and name.rpartition(".")[2].isdigit()]
        readers = several or [role]
        means = signals["input_mean"].split([weights[name].shape[1] for name in readers])
        results = {}
        for name, mean in zip(readers, means, strict=True):
            gone = mean * ~mask.repeat_interleave(len(mean) // target.units)
            bias, given = gone @ weights[name].float().T, weights.get(f"{name}.bias")
            results[f"{name}.bias"] = bias if given is None else bias + given.float()
        return results


@dataclass(frozen=True)
class WandaSP(WeightPruner):
    """Wanda-sp (baseline of arXiv 2312.11983): Wanda's scores averaged over outputs, summed over a head; the same share
    of every layer's units.
    """

    name: ClassVar[str] = "wanda_sp"

    @property
    def units(self) -> Sequence[Unit]:
        return ("heads", "channels")

    def statistics(self, unit: Unit) -> Mapping[str, type[InputNorm]]:
        return {"input_norm": InputNorm}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        scores = importance("WIFN", signals.weights[OUTPUT[target.unit]], signals["input_norm"])
        return scores.unflatten(0, (*target.shape, target.span)).sum(-1)


@dataclass(frozen=True)
class MagnitudeSP(WeightPruner):
    """Mag-sp (baseline of arXiv 2312.11983): the norms of the output projections' columns, summed over a head; the same
    share everywhere.
    """

    name: ClassVar[str] = "magnitude_sp"

    @property
    def units(self) -> Sequence[Unit]:
        return ("heads", "channels")

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        norms = signals.weights[OUTPUT[target.unit]].float().norm(dim=0)
        return norms.unflatten(0, (*target.shape, target.span)).sum(-1)
