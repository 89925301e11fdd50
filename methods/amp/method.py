"""AMP (Mugnaini et al., IJCNN 2025): in every layer, drop the same share of heads and of MLP neurons, those that
project least.

A head matters as much as what its slice of the output projection puts into the residual stream is large, a neuron as
much as its activation is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputAccumulator
from prunelab.common.weights.targets import Accumulator, Observation, Target, Unit, WeightSignals

Order = Literal["standard", "reversed", "random"]


def head_projections(inputs: Tensor, output: Tensor, heads: int) -> Tensor:
    """L1 norm [heads] of what each head adds to the stream, a token on average.

    inputs [T, heads * d] are those of the output projection [D, heads * d], whose slices of d columns are the heads'.
    """
    by_head = zip(inputs.float().chunk(heads, 1), output.float().chunk(heads, 1), strict=True)
    added = [(values @ weight.T).abs().sum() for values, weight in by_head]  # one head's [T, D] at a time
    return torch.stack(added) / max(len(inputs), 1)


class Projection(Accumulator):
    """Importance [units] of heads, averaged over prompts whatever their lengths. With grouped queries it is the sum
    over the query heads of a group."""

    def __init__(self, target: Target) -> None:
        self.units = target.units
        self.prompts = 0
        self.total = torch.zeros(())

    def update(self, observed: Observation) -> None:
        output, keys = observed.weights["o"], observed.weights["k"]
        heads = output.shape[1] // (len(keys) // self.units)
        result = head_projections(observed.inputs, output, heads)
        # assumption: what leaves together counts together, head by head as in the paper.
        self.total = self.total.to(result.device) + result.view(self.units, -1).sum(1)
        self.prompts += 1

    def value(self) -> Tensor:
        return self.total / self.prompts


class MeanMagnitude(InputAccumulator):
    """Importance [C] of neurons: their mean absolute activation over a prompt's tokens, averaged over prompts."""

    def take(self, x: Tensor) -> None:
        self.mean(x.abs().mean(0))


def removed(gone: float, heads: Target | None, neurons: Target | None, released: bool) -> tuple[int, int]:
    """Heads and neurons that go from a layer, where `gone` is the share of its parameters that should.

    Heads come in few and large steps. The neurons make up for what rounding them left over: as released one neuron for
    a whole head, otherwise as many neurons as have its parameters. Halves round to even, and one of each stays.
    """
    many, fine = heads.units if heads else 0, neurons.units if neurons else 0
    count = min(round(round(gone * many, 6)), max(many - 1, 0))
    left = gone * many - count
    # assumption: `released` equates heads and neurons by oversight; the paper speaks of parameters.
    worth = 1.0 if released or heads is None or neurons is None else heads.size / neurons.size
    return count, min(max(round(round(gone * fine + left * worth, 6)), 0), max(fine - 1, 0))


@dataclass(frozen=True)
class AMP(WeightPruner):
    """Uniform structured pruning by activation projections (arXiv 2504.21174).

    Calibrate on prompts, one vector of token ids each (the paper: 50 of Alpaca). The budget is the share that stays of
    the parameters of attention and MLPs, for all layers or one a layer. With grouped queries a unit is a key-value
    head with all its query heads.

    Parameters
    ----------
    order
        What goes first: the least important (`standard`), the most important (`reversed`, the paper's check of its
        criterion), or units by lot (`random`).
    prune
        Heads and neurons, or one of them alone (the paper's ablation).
    released
        Heads that rounding left over are made up for by as many neurons, as in the authors' code; otherwise by neurons
        of as many parameters.
    """

    order: Order = "standard"
    prune: tuple[Unit, ...] = ("heads", "channels")
    released: bool = True

    name: ClassVar[str] = "amp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prune or not set(self.prune) <= {"heads", "channels"}:
            raise PrunelabError("amp prunes heads, channels or both")

    @property
    def sequential(self) -> bool:
        return False  # the unpruned model sees every prompt once

    @property
    def units(self) -> Sequence[Unit]:
        return self.prune

    def statistics(self, unit: Unit) -> Mapping[str, type[Accumulator]]:
        return {"importance": Projection if unit == "heads" else MeanMagnitude}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        importance = signals["importance"]
        if self.order == "random":
            drawn = torch.rand(target.shape, generator=signals.rng).to(importance.device)
            return drawn + 0 * importance  # a broken activation is an error here too
        return -importance if self.order == "reversed" else importance

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        if budget.unit != "ratio":
            raise PrunelabError(f"amp prunes a ratio, not {budget}")
        amounts = []
        for target in targets:
            layer = {t.unit: t for t in targets if t.block == target.block}
            gone = round(1 - budget.at(target.block).amounts[0], 10)
            heads, neurons = removed(gone, layer.get("heads"), layer.get("channels"), self.released)
            amounts.append(Budget(heads if target.unit == "heads" else neurons, "removed"))
        return amounts
