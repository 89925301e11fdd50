"""M-SMoE (Li et al., ICLR 2024): merge experts by what the router says of them.

The most used experts of each layer are dominant; every other joins the dominant expert to which the router's logits say
it is most alike, and a group becomes the mean of its members weighted by usage. How many groups a layer keeps follows
from one threshold on usage over all layers. The router stays: merged experts are chosen as before, and computed once.
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
from prunelab.common.weights.merging import RouterGram, Usage, alike, gram, in_one_order, merged, neurons
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Decision, Probe, Statistics, Target, Unit, WeightSignals


def group_counts(usage: Tensor, total: int, merging: Sequence[int]) -> Tensor:
    """Groups [layers] of each layer, `total` in the whole model, for usage shares [layers, E].

    The most used expert of a merged layer counts 1, as do all experts of other layers; a layer keeps as many groups as
    experts lie above the `total`-th of all values (strictly, so that ties at it leave fewer).
    """
    ranked = torch.ones_like(usage)
    at = torch.tensor(list(merging))
    ranked[at] = usage[at].scatter(1, usage[at].argmax(1, keepdim=True), 1.0)
    threshold = ranked.flatten().sort(descending=True).values[min(total, ranked.numel() - 1)]
    if float(threshold) == 1:
        raise PrunelabError("m_smoe: fewer groups than layers, of which each keeps at least one; keep more")
    return (ranked > threshold).sum(1)


def grouped(similarity: Tensor, usage: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The label [E] of every expert and the dominant experts [groups] by falling usage: a label is the place of the
    dominant expert that is most alike, the more used one where two are."""
    dominant = usage.argsort(descending=True, stable=True)[:groups]
    labels = similarity[:, dominant].argmax(1)
    labels[dominant] = torch.arange(groups)
    return labels, dominant


@dataclass(frozen=True)
class MSMoE(WeightPruner):
    """Merges experts by routing statistics, without training (arXiv 2310.01334).

    Parameters
    ----------
    similarity
        Of two experts: cosine of their columns of `router-logits`, of their `router-weight` rows, or of all of their
        weights (`weight`).
    scope
        Groups are shared out over the `model` by usage, or each `layer` keeps the same number.
    align
        First bring the neurons of a group's members into the order of its first one's, as the paper does and the
        release for Mixtral does not.
    layers
        Places, among layers with experts, of those that are merged; all by default.
    """

    similarity: Literal["router-logits", "router-weight", "weight"] = "router-logits"
    scope: Literal["model", "layer"] = "model"
    align: bool = False
    layers: tuple[NonNegativeInt, ...] = ()

    name: ClassVar[str] = "m_smoe"
    exempt = {"budget": "groups are shared out over the model; layers keep different numbers"}

    @property
    def units(self) -> Sequence[Unit]:
        return ("experts",)

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {}

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """Usage, labels and the number of groups of every layer, from the dense model's routing."""
        targets, merging = probe.targets, self.layers or range(len(probe.targets))
        if not all(0 <= layer < len(targets) for layer in merging):
            raise PrunelabError(f"m_smoe: layers count from 0 to {len(targets) - 1}, not {self.layers}")
        seen = probe.statistics({"experts": {"usage": Usage, "gram": RouterGram}})
        shares = [seen[t.name]["usage"] / seen[t.name]["usage"].sum().clamp_min(1) for t in targets]
        experts = {t.units for t in targets}
        if len(experts) > 1:
            raise PrunelabError("m_smoe: layers differ in their number of experts, so that usage does not compare")
        results = {}
        for layer, (target, groups) in enumerate(zip(targets, self.groups(shares, probe.budget, merging), strict=True)):
            similarity = self.alike(seen[target.name]["gram"], probe.weights(target))
            labels = grouped(similarity, shares[layer], groups)[0]
            results[target.name] = {"labels": labels, "usage": shares[layer]}
        return results

    def groups(self, usage: Sequence[Tensor], budget: Budget, merging: Sequence[int]) -> list[int]:
        """Groups of every layer."""
        experts = len(usage[0])
        kept = [budget.at(layer).count(experts) if layer in merging else experts for layer in range(len(usage))]
        if sum(kept) == experts * len(usage):
            return kept  # nothing to merge, where the release would still merge one
        if min(kept) < 1:
            raise PrunelabError(f"m_smoe: {budget} of {experts} experts leaves a layer without a group; keep more")
        return kept if self.scope == "layer" else group_counts(torch.stack(list(usage)), sum(kept), merging).tolist()

    def alike(self, logits: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """How alike the experts of a layer are, [E, E] from 0 to 1."""
        if self.similarity == "router-weight":
            return alike(gram([weights["router"]]).cpu())
        if self.similarity == "weight":
            return alike(gram(neurons(weights["gate_up"], weights["down"])).cpu())
        return alike(logits)

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        return [Budget(len(s["labels"].unique()), "count") for s in signals]

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """Usage."""
        return signals["usage"]

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        labels, weights = signals["labels"].cpu(), signals.weights
        everything = torch.ones(target.units, dtype=torch.bool)
        if len(labels.unique()) == target.units:
            return Decision(everything)
        first = torch.stack([(labels == label).nonzero()[0, 0] for label in labels])  # the lowest member of its group
        mask = torch.zeros_like(everything).scatter(0, first, True)
        gate_up, down = weights["gate_up"], weights["down"]
        if self.align:
            gate_up, down = in_one_order(gate_up, down, first)
        values = {n: merged(part, labels, signals["usage"].cpu()) for n, part in (("gate_up", gate_up), ("down", down))}
        return Decision(mask, values, share=first)
