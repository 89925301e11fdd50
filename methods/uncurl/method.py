"""UNCURL (Sarkar et al., 2024): fewer experts for one task, by merging those that the router treats alike.

A reconstruction: no code was released and only summaries of the text are public. Experts of a layer are clustered by
their columns of router logits on the task's data; the neurons of a cluster are brought into one order; the cluster's
mean, weighted by how often its members are used, takes its place, and the router keeps one row a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.merging import (
    RouterGram,
    Usage,
    alike,
    in_one_order,
    leaders,
    merged,
    spectral_clusters,
)
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Decision, Probe, Statistics, Target, Unit, WeightSignals


@dataclass(frozen=True)
class Uncurl(WeightPruner):
    """Merges the experts of every layer into as many as the budget says, for one task (arXiv 2409.01483).

    Calibrate on text of the task.

    Parameters
    ----------
    affinity
        Of two experts: `cosine` of their columns of router logits, or their `correlation`, from 0 to 1.
        # assumption: the summaries name neither.
    align
        Bring neurons into the order of the cluster's most used expert first.
    router
        A cluster's row: the `mean` of its members', or its most used member's (`leader`). # assumption: as above.
    """

    affinity: Literal["cosine", "correlation"] = "cosine"
    align: bool = True
    router: Literal["mean", "leader"] = "mean"

    name: ClassVar[str] = "uncurl"

    @property
    def units(self) -> Sequence[Unit]:
        return ("experts",)

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """Clusters and usage of every layer, from the dense model's routing."""
        centred = self.affinity == "correlation"
        wanted: Mapping[str, Callable[[Target], Accumulator]] = {
            "usage": Usage,
            "gram": lambda target: RouterGram(target, centred),
        }
        seen = probe.statistics({"experts": wanted})
        results = {}
        for target in probe.targets:
            groups = probe.budget.at(target.block).count(target.units)
            if groups < target.least:
                raise PrunelabError(
                    f"uncurl: {target.name} would keep {groups} experts, fewer than the {target.least} of a token;"
                    " keep more"
                )
            usage, gram = seen[target.name]["usage"], seen[target.name]["gram"]
            labels = spectral_clusters(alike(gram), groups) if groups < target.units else torch.arange(target.units)
            results[target.name] = {"leaders": leaders(labels, usage), "usage": usage}
        return results

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """Usage."""
        return signals["usage"]

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        leader, weights = signals["leaders"].cpu(), signals.weights
        mask = torch.zeros(target.units, dtype=torch.bool).scatter(0, leader, True)
        if bool(mask.all()):
            return Decision(mask)
        gate_up, down = weights["gate_up"], weights["down"]
        if self.align:
            gate_up, down = in_one_order(gate_up, down, leader)
        usage = signals["usage"].cpu()
        values = {"gate_up": merged(gate_up, leader, usage), "down": merged(down, leader, usage)}
        if self.router == "mean":
            values["router"] = merged(weights["router"], leader, torch.ones_like(usage))
        return Decision(mask, values)
