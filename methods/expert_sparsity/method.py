"""Expert pruning by enumeration (Lu et al., ACL 2024): of each layer the experts stay whose mixture is nearest to all.

The inputs and outputs of a layer's mixture are kept on a few texts. Every set of so many experts is tried on these
inputs, its router choosing among the set alone, and the one whose outputs differ least stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import PositiveInt
from prunelab.common.weights.leaving import Losses
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Probe, Statistics, Target, Unit, WeightSignals


def sets(experts: int, kept: int) -> Iterator[Tensor]:
    """Every set [kept] of experts that may stay, in the order of the sets that leave, as released."""
    for gone in combinations(range(experts), experts - kept):
        yield torch.tensor([expert for expert in range(experts) if expert not in gone])


@dataclass(frozen=True)
class ExpertSparsity(WeightPruner):
    """Tries every set of experts of a layer, on the unpruned model's inputs (arXiv 2402.14800, layer by layer).

    Parameters
    ----------
    together
        Sequences of which the norm of the difference is one; norms are added up.
    most
        Sets to try in a layer. Their number grows fast: a mixture of 64 experts has too many.
    """

    together: PositiveInt = 8
    most: PositiveInt = 100_000

    name: ClassVar[str] = "expert_sparsity"

    @property
    def units(self) -> Sequence[Unit]:
        return ("experts",)

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """Of every layer the mask of the set that loses least; of equal ones the first."""
        tried = {target.name: self.tried(target, probe.budget) for target in probe.targets}

        def losses(target: Target) -> Accumulator:
            return Losses(target, tried[target.name], self.together)

        found = probe.statistics({"experts": {"losses": losses}})
        results = {}
        for target in probe.targets:
            best = tried[target.name][int(found[target.name]["losses"].argmin())]
            results[target.name] = {"stays": torch.zeros(target.units).index_fill(0, best, 1.0)}
        return results

    def tried(self, target: Target, budget: Budget) -> list[Tensor]:
        """The sets of a layer."""
        kept = budget.at(target.component if budget.names else target.block).count(target.units)
        if kept < target.least:
            raise PrunelabError(f"{target.name} would keep {kept} experts, fewer than the {target.least} of a token")
        if (count := comb(target.units, kept)) > self.most:
            raise PrunelabError(
                f"expert_sparsity would try {count:,} sets of {kept} of {target.units} experts in {target.name}; raise"
                " `most`, or choose a method that scores experts one by one"
            )
        return list(sets(target.units, kept))

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals["stays"]
