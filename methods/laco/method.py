"""LaCo (Yang et al., Findings of EMNLP 2024): collapse layers into the one below them while the output stays alike.

From the top of the network down, a layer absorbs the layers that follow it. The merge is kept if the last hidden states
of a few sentences stay as similar to the dense model's as a threshold asks; otherwise the walk goes one layer down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, NonNegativeInt, PositiveInt
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Decision, Probe, Statistics, Target, Unit, WeightSignals

Rule = Literal["last", "differences"]
VALUE = "value."  # in front of the names of a merged layer's tensors


@dataclass(frozen=True)
class Layer:
    """A layer of a collapsed model: the dense layer whose place and norms it has, and its projections as a combination
    of dense layers' ones, (index, coefficient) each."""

    base: int
    parts: tuple[tuple[int, int], ...]


Layers = tuple[Layer, ...]


def dense_layers(depth: int) -> Layers:
    """The layers of the dense model."""
    return tuple(Layer(i, ((i, 1),)) for i in range(depth))


def merged(layers: Layers, place: int, absorbed: int, rule: Rule = "last") -> Layers:
    """The layers with those behind a place merged into the one there. `differences` adds to its projections what each
    absorbed layer differs from them (Eq. 1); `last` takes the projections of the last absorbed layer."""
    into, following = layers[place], layers[place + 1 : place + 1 + absorbed]
    parts: Counter[int] = Counter(dict(into.parts))
    for layer in following:
        if rule == "last":
            parts = Counter(dict(layer.parts))
        else:
            for sign, other in ((1, layer), (-1, into)):
                for index, coefficient in other.parts:
                    parts[index] += sign * coefficient
    into = Layer(into.base, tuple(sorted((i, c) for i, c in parts.items() if c)))
    return (*layers[:place], into, *layers[place + 1 + absorbed :])


@dataclass(frozen=True)
class Step:
    """One merge that was tried: into which place of how many layers, what came out, how similar, whether it stays."""

    place: int
    before: Layers
    candidate: Layers
    similarity: float
    accepted: bool

    @property
    def after(self) -> Layers:
        """The layers as the step leaves them."""
        return self.candidate if self.accepted else self.before


def walk(
    layers: Layers,
    similarity: Callable[[Layers], float],
    threshold: float,
    merge_layers: PositiveInt = 3,
    interval: PositiveInt = 1,
    lowest: NonNegativeInt = 0,
    highest: NonNegativeInt | None = None,
    rule: Rule = "last",
    most: int | None = None,
) -> Iterator[Step]:
    """The merges that are tried from the top down (Algorithm 1). See `LaCo` for the arguments; at most `most` layers
    leave."""
    depth = len(layers)
    most = depth if most is None else most
    place = (depth - 1 if highest is None else highest) - merge_layers
    place = max(place, lowest)  # assumption: a model that is too shallow for one whole merge is merged in part
    while place >= lowest and depth - len(layers) < most:
        absorbed = min(merge_layers - 1, len(layers) - place - 1, most - (depth - len(layers)))
        candidate = merged(layers, place, absorbed, rule)
        result = similarity(candidate)
        step = Step(place, layers, candidate, result, result > threshold)
        yield step
        layers = step.after
        place -= interval if step.accepted else 1
        if step.accepted and place >= len(layers):
            place = len(layers) - 1 - merge_layers


def collapse(steps: Callable[[float], Iterator[Step]], wanted: int) -> Layers | None:
    """The layers after the walk under the highest threshold that leaves `wanted` of them, None if there is none. It is
    found by halving, between thresholds at which walks change, as if a lower one never left more layers."""

    def tried(threshold: float) -> tuple[Layers | None, float, float]:
        """What is left; below which threshold the walk changes, and from which one upwards."""
        made = list(steps(threshold))
        refused = max((step.similarity for step in made if not step.accepted), default=-math.inf)
        accepted = min((step.similarity for step in made if step.accepted), default=math.inf)
        return made[-1].after if made else None, math.nextafter(refused, -math.inf), accepted

    after, upper, _ = tried(1.0)
    if after is None or len(after) == wanted:
        return after
    found, _, accepted = tried(-2.0)  # below every cosine
    while found is not None and len(found) == wanted:
        lower = math.nextafter(accepted, -math.inf)  # the highest that gives the same walk
        if upper <= lower:
            return found
        middle = (upper + lower) / 2
        after, changed, least = tried(middle if lower < middle < upper else upper)
        if after is not None and len(after) == wanted:
            found, accepted = after, least
        else:
            upper = changed
    return None


def combination(tensors: Sequence[Tensor], coefficients: Sequence[int]) -> Tensor:
    """A sum of tensors of one shape, each times its coefficient; in their own type, summed in float32."""
    if len(tensors) == 1 and coefficients[0] == 1:
        return tensors[0]
    total = sum(tensor.float() * coefficient for tensor, coefficient in zip(tensors, coefficients, strict=True))
    assert isinstance(total, Tensor)
    return total.to(tensors[0].dtype)


def projections(weights: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a layer that a merge changes: its matrices with their biases, not its norms."""
    matrices = [name for name, tensor in weights.items() if tensor.dim() > 1]
    biases = [f"{name.removesuffix('weight')}bias" for name in matrices]
    return [name for name in weights if name in {*matrices, *biases}]


@dataclass(frozen=True)
class LaCo(WeightPruner):
    """Removal of layers by merging them into ones below, without training (arXiv 2402.11187).

    The budget is how many layers leave: that many at most under a given threshold, exactly that many without one. The
    defaults are those of the authors' notebook for Baichuan2-13B; for Llama-2-13B it merges 7 layers at 0.45.

    Parameters
    ----------
    threshold
        Similarity above which a merge is kept; None is the highest under which the budget is met, found by halving.
    merge_layers
        Layers that become one (C).
    interval
        Layers between two merges that were kept (I).
    lowest, highest
        Indices of the first and last layer of the range (L, H); None is the model's last.
    rule
        `last`: as released, where every addition overwrites the one before, a merged layer has the projections of
        the last one it absorbed. `differences` is the paper's: the sum of all differences is added to its own.
    """

    threshold: FiniteFloat | None = None
    merge_layers: PositiveInt = 3
    interval: PositiveInt = 1
    lowest: NonNegativeInt = 0
    highest: NonNegativeInt | None = None
    rule: Rule = "last"

    name: ClassVar[str] = "laco"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_layers < 2:
            raise PrunelabError("laco: a merge takes at least 2 layers; give merge_layers=2 or more")

    @property
    def sequential(self) -> bool:
        return False  # merges are judged by the last hidden states of the whole model

    @property
    def units(self) -> Sequence[Unit]:
        return ("layers",)

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """Which layers stay, and the new projections of those that absorbed others."""
        layers = self.layers(probe)
        results: dict[str, dict[str, Tensor]] = {t.name: {"stays": torch.tensor(0.0)} for t in probe.targets}
        for layer in layers:
            target = probe.targets[layer.base]
            values = self.values(probe, layer)
            results[target.name] = {"stays": torch.tensor(1.0), **{f"{VALUE}{k}": v.clone() for k, v in values.items()}}
        return results

    def layers(self, probe: Probe) -> Layers:
        """The layers of the collapsed model."""
        dense, most = dense_layers(len(probe.targets)), probe.budget.pruned(len(probe.targets))
        if most >= len(dense):
            raise PrunelabError(f"laco would remove all layers under {probe.budget}; keep more")
        if most == 0:
            return dense
        similarity = Similarity(self, probe)

        def steps(threshold: float) -> Iterator[Step]:
            return walk(
                dense,
                similarity,
                threshold,
                self.merge_layers,
                self.interval,
                self.lowest,
                self.highest,
                self.rule,
                most,
            )

        if self.threshold is not None:
            return next((step.after for step in reversed(list(steps(self.threshold)))), dense)
        result = collapse(steps, len(dense) - most)
        if result is None:
            raise PrunelabError(
                f"laco cannot take {most} of {len(dense)} layers; merge more layers, or over more of them"
            )
        return result

    def values(self, probe: Probe, layer: Layer) -> dict[str, Tensor]:
        """The new projections of a layer, none where it absorbed no other."""
        if layer.parts == ((layer.base, 1),):
            return {}
        own = [probe.weights(probe.targets[index]) for index, _ in layer.parts]
        if any(other.keys() != own[0].keys() for other in own):
            raise PrunelabError(f"laco merges layers that are built alike, which those around {layer.base} are not")
        coefficients = [coefficient for _, coefficient in layer.parts]
        return {name: combination([w[name] for w in own], coefficients) for name in projections(own[0])}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals["stays"].view(1)

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        return super().select(targets, signals, scores, budget) if self.threshold is None else [s >= 1 for s in scores]

    def update(self, target: Target, signals: WeightSignals, mask: Tensor) -> Mapping[str, Tensor]:
        return {k.removeprefix(VALUE): v for k, v in signals.statistics.items() if k.startswith(VALUE)}


class Similarity:
    """How alike the last hidden states of a collapsed model are to the dense model's: the cosine of all tokens of a
    sentence in one vector, averaged over sentences. What was measured once is kept."""

    def __init__(self, method: LaCo, probe: Probe) -> None:
        self.method = method
        self.probe = probe
        self.dense = self.states()
        self.known: dict[Layers, float] = {}

    def states(self) -> list[Tensor]:
        """The last hidden states of every sentence, behind the final norm, in one vector."""
        return [self.probe.final_state(sample).flatten().float() for sample in self.probe.samples]

    def __call__(self, layers: Layers) -> float:
        if layers not in self.known:
            stay = {layer.base: layer for layer in layers}
            decisions = []
            for index, target in enumerate(self.probe.targets):
                values = self.method.values(self.probe, stay[index]) if index in stay else {}
                decisions.append((target, Decision(torch.tensor([index in stay]), values)))
            with self.probe.trial(decisions):
                results = [F.cosine_similarity(a, b, dim=0) for a, b in zip(self.dense, self.states(), strict=True)]
            self.known[layers] = float(torch.stack(results).double().mean())
            if math.isnan(self.known[layers]):
                raise PrunelabError("laco: the last hidden states hold NaN; check the weights, or use a wider dtype")
        return self.known[layers]
