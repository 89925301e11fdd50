"""STUN (Lee et al., ACL 2025): of a mixture of experts first remove alike experts, then prune single weights.

Stage one clusters the experts of every layer by how alike they behave, judged by their router rows or by how often
tokens choose them together; one threshold for all layers is searched until the model holds the wanted number of
clusters, and one expert stands for each. Stage two is Wanda or OWL on what is left, up to the sparsity of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveShare
from prunelab.common.weights.leaving import Losses, all_but_one
from prunelab.common.weights.role import WeightPruner
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
from prunelab.methods.stun.outliers import importance, one_ratio, outlier_shares, owl_budgets

Similarity = Literal["router", "coactivation", "both"]
Trials = Callable[[float], int]

# -- stage one: experts ----------------------------------------------------------------------------------------------


class CoActivation(Accumulator):
    """Tokens [E, E] for which two experts are the router's first two choices."""

    def __init__(self, target: Target) -> None:
        self.counts = torch.zeros(target.units, target.units)

    def update(self, observed: Observation) -> None:
        assert observed.routing is not None
        first, second = observed.routing.logits.topk(2).indices.cpu().unbind(-1)
        ones = torch.ones(len(first))
        self.counts.index_put_((first, second), ones, accumulate=True)
        self.counts.index_put_((second, first), ones, accumulate=True)

    def value(self) -> Tensor:
        return self.counts


def router_distance(router: Tensor, by_norm: bool = False) -> Tensor:
    """||W_i - W_j|| [E, E] of router rows [E, D], or that over the Frobenius norm of the router."""
    distance = torch.cdist(router.float(), router.float())
    return distance / router.float().norm() if by_norm else distance


def coactivation_distance(counts: Tensor) -> Tensor:
    """Experts used together are alike: the negative counts [E, E] in units of their mean."""
    if not bool(counts.any()):
        raise PrunelabError("no two experts are ever chosen together; give more calibration data")
    return -counts.float() / counts.float().mean()


def cluster(distance: Tensor, threshold: float, least: int = 1) -> Tensor:
    """Cluster number [E] of every expert, numbered by first member, from distances [E, E].

    The nearest pair below the threshold unites its clusters A and B if the members of A lie within the threshold of
    B's end of the pair and those of B within A's end, and is refused otherwise; distances of united members are
    struck out, and so block a later union that would ask for them again (a weaker complete linkage, as released).
    Stops at `least` clusters.
    """
    distance, experts = distance.clone().fill_diagonal_(torch.inf), len(distance)
    labels, clusters = torch.arange(experts), experts
    distance = distance.cpu()
    while clusters > least:
        i, j = divmod(int(distance.argmin()), experts)
        if not float(distance[i, j]) < threshold:
            break
        a, b = labels == labels[i], labels == labels[j]
        if max(float(distance[a, j].max()), float(distance[b, i].max())) < threshold:
            distance[a, j] = distance[b, i] = torch.inf
            labels[a | b] = min(int(labels[i]), int(labels[j]))
            clusters -= 1
        else:
            distance[i, j] = distance[j, i] = torch.inf
    return labels.unique(return_inverse=True)[1]


def search_threshold(clusters: Trials, wanted: int, start: float = 0.5, step: float = 0.1) -> float:
    """The threshold at which all layers together have the wanted number of clusters. The step doubles until the search
    turns round, and is halved from then on.

    # assumption: where the number jumps over the wanted one, the nearest larger number is taken; the release gives up.
    """
    threshold, last, turned = start, 0, False
    best: tuple[int, float] | None = None
    for _ in range(100):
        result = clusters(threshold)
        if result >= wanted and (best is None or result < best[0]):
            best = (result, threshold)
        if result == wanted:
            break
        direction = 1 if result > wanted else -1
        turned = turned or direction * last < 0
        step = step / 2 if turned else step * 2
        threshold, last = threshold + direction * step, direction
    if best is None:
        raise PrunelabError(f"no threshold leaves {wanted} experts; the distances of the routers are not finite")
    return best[1]


def representatives(experts: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The expert [K] of every cluster whose weights, all in one vector, lie closest to the cluster's mean; experts are
    parameters [E, ...]."""
    chosen = []
    for number in range(int(labels.max()) + 1):
        members = (labels == number).nonzero().flatten()
        if len(members) > 1:
            weights = torch.cat([part[members.to(part.device)].flatten(1).float() for part in experts], 1)
            centre = weights.sum(0) / len(members)
            # One norm a vector: two members lie equally far from their mean, and rounding decides.
            members = members[int(torch.stack([(weight - centre).norm() for weight in weights]).argmin())]
        chosen.append(members.reshape(()))
    return torch.stack(chosen)


def most_missed(losses: Tensor, labels: Tensor) -> Tensor:
    """The expert [K] of every cluster without which alone most is lost [E], the first of equal ones."""
    losses = losses.cpu()
    numbers = range(int(labels.max()) + 1)
    return torch.stack([losses.masked_fill(labels != number, -torch.inf).argmax() for number in numbers])


def cluster_means(parameter: Tensor, labels: Tensor) -> Tensor:
    """Mean [K, ...] of an expert parameter [E, ...] over each cluster."""
    numbers = range(int(labels.max()) + 1)
    return torch.stack([parameter[(labels == number).to(parameter.device)].float().mean(0) for number in numbers])


# -- stage two: weights ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owl(WeightPruner):
    """Wanda under OWL's allocation (arXiv 2310.05175): blocks with many outliers keep more of their weights.

    # assumption: M = 5 and 0.08, OWL's own choice for LLaMA; STUN's values for its models are not known.

    Parameters
    ----------
    outlier
        Times the block's mean score from which a weight is an outlier (M).
    spread
        Half the range of ratios.
    """

    outlier: PositiveFloat = 5.0
    spread: NonNegativeFloat = 0.08

    name: ClassVar[str] = "owl"
    exempt = {"budget": "blocks keep different shares"}

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"input_norm": InputNorm} if unit == "linear" else {}

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        return outlier_shares(probe, probe.targets, self.outlier)

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        budgets = owl_budgets(list(zip(targets, signals, strict=True)), one_ratio(budget, self.name), self.spread)
        return [budgets[target.name] for target in targets]

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return importance(signals.weight, signals["input_norm"])


# -- both ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stun(Owl):
    """Experts first, weights second, to one sparsity counted over all parameters of both stages (arXiv 2409.06211).

    Parameters
    ----------
    experts
        Share of all experts that stage one keeps (0.797 for Arctic), more where the budget asks for less.
    similarity
        `router` rows, `coactivation` counts, or `both` (counts times `mix` and rows together).
    mix
        Weight of the counts.
    by_norm
        Router distances over the router's norm, so that layers of unlike norms compare.
    representative
        Who stays of a cluster: the `nearest` to its mean, without a forward pass, or the one whose leaving alone costs
        the mixture's output most (`loss`), for which a pass leaves each expert out once, O(n).
        # assumption: that this is the paper's O(n), which sources that could be read only name.
    means_up_to
        Layers of at most so many clusters get their experts' means instead of representatives.
    then
        Stage two. With `none` the budget is the share of experts, and `experts` is not read.
    outlier, spread
        Of OWL, see `Owl`.
    """

    experts: PositiveShare = 0.8
    similarity: Similarity = "router"
    mix: NonNegativeFloat = 1.0
    by_norm: bool = False
    representative: Literal["nearest", "loss"] = "nearest"
    means_up_to: NonNegativeInt = 2
    then: Literal["owl", "wanda", "none"] = "owl"

    name: ClassVar[str] = "stun"
    exempt = {"budget": "layers keep different numbers of experts, and the budget counts both stages together"}

    @property
    def units(self) -> Sequence[Unit]:
        return ("experts",) if self.then == "none" else ("experts", "linear")

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """The clusters of every layer's experts, and the blocks' outlier shares."""
        layers = [target for target in probe.targets if target.unit == "experts"]
        distances = self.distances(probe, layers)
        least = [target.least for target in layers]

        def clusters(threshold: float) -> list[Tensor]:
            return [cluster(d, threshold, at_least) for d, at_least in zip(distances, least, strict=True)]

        wanted = self.experts_kept(probe.targets, probe.budget)
        if wanted < sum(least):
            raise PrunelabError(
                f"stun: {wanted} experts are fewer than the {sum(least)} that tokens are sent to; keep more"
            )
        threshold = search_threshold(lambda t: sum(int(x.max()) + 1 for x in clusters(t)), wanted)
        results = {t.name: {"clusters": labels} for t, labels in zip(layers, clusters(threshold), strict=True)}
        if self.representative == "loss":
            able = {t.name for t in layers if t.units > t.least}  # the others keep all

            def alone(target: Target) -> Accumulator:
                return Losses(target, all_but_one(target.units) if target.name in able else ())

            found = probe.statistics({"experts": {"alone": alone}})
            results = {name: {**own, "alone": found[name]["alone"]} for name, own in results.items()}
        if self.then == "owl":
            linears = [target for target in probe.targets if target.unit == "linear"]
            results |= outlier_shares(probe, linears, self.outlier)
        return results

    def distances(self, probe: Probe, layers: Sequence[Target]) -> list[Tensor]:
        """How unlike the experts of every layer are, [E, E]."""
        results = []
        counts = {} if self.similarity == "router" else probe.statistics({"experts": {"counts": CoActivation}})
        for target in layers:
            distance = router_distance(probe.weights(target)["router"], self.by_norm).cpu()
            if not bool(distance.isfinite().all()):
                raise PrunelabError(f"the router of {target.name} holds NaN or infinite values; check the weights")
            if self.similarity != "router":
                used = coactivation_distance(counts[target.name]["counts"].cpu())
                distance = used if self.similarity == "coactivation" else used * self.mix + distance
            results.append(distance)
        return results

    def experts_kept(self, targets: Sequence[Target], budget: Budget) -> int:
        """Experts that stage one keeps in the whole model, never fewer than the budget makes necessary."""
        keep, layers = one_ratio(budget, self.name), [target for target in targets if target.unit == "experts"]
        experts = sum(target.units for target in layers)
        if self.then == "none":
            return experts - budget.pruned(experts)
        least = experts - int((1 - keep) * prunable(targets) / max(target.size for target in layers))
        return max(experts - Budget(self.experts).pruned(experts), least)

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        """Of experts as many as there are clusters; of weights what is still to go, among those that are left."""
        experts = {
            t.block: int(s["clusters"].max()) + 1 for t, s in zip(targets, signals, strict=True) if t.unit == "experts"
        }
        budgets = {t.name: Budget(experts[t.block], "count") for t in targets if t.unit == "experts"}
        left = [
            (t, s)
            for t, s in zip(targets, signals, strict=True)
            if t.unit == "linear" and t.expert < experts.get(t.block, 0)
        ]
        if left:
            removed = sum(t.size * (t.units - experts[t.block]) for t in targets if t.unit == "experts")
            gone = (1 - one_ratio(budget, self.name)) * prunable(targets) - removed
            keep = min(max(1 - gone / sum(target.units for target, _ in left), 0.0), 1.0)
            uniform = {target.name: Budget(keep) for target, _ in left}
            budgets |= owl_budgets(left, keep, self.spread) if self.then == "owl" else uniform
        return [
            budgets.get(target.name, Budget(1.0)) for target in targets
        ]  # weights of experts that leave stay as they are

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        if target.unit != "experts":
            return super().solve(target, signals, budget)
        labels, weights = signals["clusters"].cpu(), signals.weights
        clusters, mask = int(labels.max()) + 1, torch.zeros(target.units, dtype=torch.bool)
        if clusters > self.means_up_to or clusters == target.units:
            if clusters == target.units:
                return Decision(~mask)
            gate, up = weights["gate_up"].chunk(2, 1)
            dearest = self.representative == "loss"
            parts = [gate, weights["down"], up]
            mask[most_missed(signals["alone"], labels) if dearest else representatives(parts, labels)] = True
            return Decision(mask)
        first = torch.stack([(labels == number).nonzero()[0, 0] for number in range(clusters)])
        mask[first] = True
        values = {role: part.clone() for role, part in weights.items()}
        for role, part in weights.items():
            values[role][first.to(part.device)] = cluster_means(part, labels).to(part.dtype)
        return Decision(mask, values)


def prunable(targets: Sequence[Target]) -> int:
    """Parameters of experts with their router rows, and of all other linears."""
    return sum(target.parameters for target in targets if target.expert < 0)
