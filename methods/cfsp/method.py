"""CFSP (Wang et al., COLING 2025): prune MLP neurons from coarse to fine, from the activations of one forward pass.

Coarse: a block that turns its hidden states by a larger angle keeps more neurons. Fine: inside a block the neurons of
largest activation, weighted by their share of the weights, stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, NonNegativeFloat, NonNegativeInt
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Accumulator, Observation, Target, Unit, WeightSignals

Coarse = Literal["angular", "cosine", "mse", "mae", "uniform"]
Fine = Literal["three_w_one_wa", "three_w_one_a", "one_wa", "one_a", "wanda"]

DIVISOR = 1e4  # of the summed importance in front of the sigmoid, as released
TOKENS = 128 * 1024  # calibration tokens of the release, for which the divisor was chosen


def influence(before: Tensor, after: Tensor, measure: Coarse) -> Tensor:
    """How much a block changes each token [T], from its hidden states [T, D] in front of it and behind it."""
    if measure == "mse":
        return (before - after).square().mean(-1)
    if measure == "mae":
        return (before - after).abs().mean(-1)
    cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    cosine = cosine.nan_to_num(nan=0.5).clamp(-1, 1)  # a state that is zero counts as 60 degrees, as released
    return cosine.arccos() / math.pi if measure == "angular" else 1 - cosine


class BlockInfluence(Accumulator):
    """The influence of a target's block, a scalar: summed over all calibration tokens, or averaged over them and put
    on the scale of the release's calibration set."""

    def __init__(self, target: Target, measure: Coarse, summed: bool) -> None:
        self.measure = measure
        self.summed = summed
        self.total = 0.0
        self.tokens = 0

    def update(self, observed: Observation) -> None:
        self.tokens += len(observed.before)
        if self.measure == "uniform":
            self.total += 100.0  # any number a sequence, as long as it is the same for all blocks
        else:
            change = influence(observed.before.float(), observed.after.float(), self.measure)
            self.total += float(change.double().sum())

    def value(self) -> Tensor:
        # assumption: the paper means an average; the release's own set then gives the release's own allocation.
        scale = 1.0 if self.summed else TOKENS / max(self.tokens, 1)
        return torch.tensor(self.total * scale, dtype=torch.float64)


def kept_shares(influences: Tensor, keep: float, a: float) -> Tensor:
    """Share of its neurons that each block [L] keeps, `keep` on average.

    Deviations from the mean influence go through a sigmoid of steepness a. Where the first block would keep more than
    all, all deviations shrink until it keeps 1 / 1.05 of the way to all.
    """
    if keep == 1:
        return torch.ones_like(influences)
    scores = torch.sigmoid(a * (influences - influences.mean()) / DIVISOR)
    mean, most = scores.mean(), scores.max()
    if most / mean * keep >= 1:
        scores = mean + (scores - mean) * mean * (1 / keep - 1) / (most - mean) / 1.05
    return scores / scores.mean() * keep


def relative(weight: Tensor) -> Tensor:
    """|W| [D, C] with every column summing to one; columns of zeros stay zero."""
    weight = weight.float().abs()
    return weight / weight.sum(0).clamp_min(torch.finfo(weight.dtype).tiny)


def neuron_scores(weights: Mapping[str, Tensor], activation: Tensor, criterion: Fine, b: float, c: float) -> Tensor:
    """Score [I] of the neurons from their activation norms [I] and the weights `gate` and `up` [I, D], `down` [D, I].

    W stands for the relative weights of `down` alone or of all three, A for the activation norms, WA for `down` times
    A^b before it is made relative. Columns of relative weights sum to one and the mean over D is taken last, so that
    in all criteria but `wanda` the weights cancel out: neurons rank by A^c.
    """
    down = weights["down"]
    if criterion == "wanda":
        return (down.float().abs() * activation).mean(0)
    if criterion == "one_a":
        return (relative(down) * activation.sqrt()).mean(0)
    shares = relative(down.float() * activation.pow(b) if criterion.endswith("wa") else down)
    if criterion.startswith("three"):
        shares = shares + sum(relative(weights[role].T) for role in ("up", "gate") if role in weights)
    return (shares * activation.pow(c)).mean(0)


@dataclass(frozen=True)
class CFSP(WeightPruner):
    """Structured pruning of MLP neurons by block importance and neuron importance (arXiv 2409.13199).

    The budget is the share that stays of the neurons; attention is not touched, whatever its grouping.

    Parameters
    ----------
    coarse
        How the change a block makes is measured; under `uniform` blocks are all alike.
    fine
        How neurons score (see `neuron_scores`).
    a
        Steepness of the allocation.
    b, c
        Exponents of the activation.
    multiple
        Kept numbers are rounded to multiples of it, 128 for the speed of GPU kernels; 0 for any number.
    released
        As the authors' code has it: influence is summed over tokens, so that the allocation depends on the size of the
        calibration set; one neuron more than its share stays in each block; a block whose number rounds to no multiple
        is kept whole. Otherwise influence is put on the scale of 128 x 1024 tokens, numbers are exact, and at least one
        multiple stays.
    """

    coarse: Coarse = "angular"
    fine: Fine = "three_w_one_wa"
    a: NonNegativeFloat = 1.0
    b: FiniteFloat = 1.0
    c: FiniteFloat = 1.0
    multiple: NonNegativeInt = 0
    released: bool = True

    name: ClassVar[str] = "cfsp"
    exempt = {"budget": "blocks keep different shares, and as released one neuron more each"}

    @property
    def sequential(self) -> bool:
        return False  # blocks are compared, on what the dense model gives

    @property
    def units(self) -> Sequence[Unit]:
        return ("channels",)

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {
            "influence": lambda target: BlockInfluence(target, self.coarse, self.released),
            "input_norm": InputNorm,
        }

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return neuron_scores(signals.weights, signals["input_norm"].sqrt(), self.fine, self.b, self.c)

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        if budget.unit != "ratio" or len(budget.amounts) > 1:
            raise PrunelabError(f"cfsp shares one ratio out over the blocks, not {budget}")
        influences = torch.stack([seen["influence"] for seen in signals])
        shares = kept_shares(influences, budget.amounts[0], self.a).tolist()
        return [Budget(self.kept(t.units, share), "count") for t, share in zip(targets, shares, strict=True)]

    def kept(self, units: int, share: float) -> int:
        """Neurons that stay in a block of `units`."""
        wanted = round(units * share, 6)
        if self.multiple:
            count = int((wanted + self.multiple / 2) / self.multiple) * self.multiple
            least = units if self.released else self.multiple
            return min(count or least, units)
        return min(max(int(wanted) + self.released, 1), units)
