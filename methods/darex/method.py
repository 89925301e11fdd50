"""DARE (Yu et al., ICML 2024) and DAREx-q (Deng et al., ICLR 2025): drop most of what fine-tuning changed.

Delta parameters, fine-tuned minus pre-trained, are dropped at random with rate p, and the rest is divided by q. DARE
takes q = 1 - p, which keeps every output's expectation; at high rates its variance ruins the model, and DAREx-q takes a
larger q: one for the model, found by validation, or one a layer, from a bound on the change of the layer's outputs.
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
from prunelab.common.core.options import FiniteFloat, PositiveFloat, PositiveShare, Within
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputMean
from prunelab.common.weights.targets import Decision, Probe, Statistics, Target, Unit, WeightSignals
from prunelab.methods.darex.analytic import analytic_q, q_by_name

CLASSIFIERS = ("classifier", "lm_head", "score")
PATIENCE = 4  # worse trials in a row that end a search


def delta(fine: Tensor, base: Tensor) -> Tensor:
    """What fine-tuning changed, in float32."""
    return fine.float() - base.float()


def merged(base: Tensor, delta: Tensor, mask: Tensor, q: float | Tensor) -> Tensor:
    """The pre-trained weight with the deltas that stay, rescaled, in float32."""
    return base.float() + delta * mask / q


def search(
    score: Callable[[float], float], low: float, high: float, step: float, limit: float = math.inf, refine: float = 0.1
) -> float:
    """The value of the best score: steps from `low` to `high` until four in a row are worse than the best, then steps
    `refine` times as long around the best found, likewise. Of equal scores the one tried first wins. As released, both
    walks may pass `high` by a step; none passes `limit`."""
    scores: dict[float, float] = {}

    def walk(low: float, high: float, step: float) -> None:
        best, worse = -math.inf, 0
        for i in range(math.ceil(round((high - low) / step, 6))):
            value = low + i * step
            if value > limit:
                return
            scores[value] = score(value)
            best, worse = (scores[value], 0) if scores[value] >= best else (best, worse + 1)
            if worse == PATIENCE:
                return

    walk(low, high + step, step)
    best = max(scores, key=scores.__getitem__)
    walk(max(low + refine * step, best - (1 - refine) * step), best + step, refine * step)
    return max(scores, key=scores.__getitem__)


@dataclass(frozen=True)
class Dare(WeightPruner):
    """Drop and rescale (arXiv 2311.03099). The budget is the share of deltas that stays, on average; the model is
    fine-tuned, `base` is the model before.

    Parameters
    ----------
    q
        Divisor of the deltas that stay; None is DARE's own 1 - p.
    scope
        `layers` touches attention and MLP alone (as for decoders), `all` every tensor but classifiers (encoders).
    """

    q: PositiveShare | None = None
    scope: Literal["layers", "all"] = "layers"

    name: ClassVar[str] = "dare"
    needs_base = True
    exempt = {"budget": "every delta stays or goes by a draw of its own"}

    @property
    def units(self) -> Sequence[Unit]:
        return ("linear", "tensor")

    def covers(self, target: Target) -> bool:
        if self.scope == "all":
            return not any(name in target.name for name in CLASSIFIERS)
        return bool(target.part)

    def rate(self, budget: Budget) -> float:
        """Share p of the deltas that goes."""
        if budget.unit != "ratio" or len(budget.amounts) != 1:
            raise PrunelabError(f"{self.name} keeps a share of the deltas, not {budget}; write it as 0.1")
        return 1 - budget.amounts[0]

    def changes(self, target: Target, signals: WeightSignals) -> Tensor:
        """The deltas of a target."""
        assert signals.base is not None
        fine, base = signals.weight, signals.base["weight"]
        if fine.shape != base.shape:
            raise PrunelabError(
                f"{target.name} is {tuple(fine.shape)}, in the base model {tuple(base.shape)}; resize it"
            )
        return delta(fine, base)

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """A draw for every delta, in [0, 1)."""
        return torch.rand(target.shape, generator=signals.rng).to(signals.weight.device)

    def mask(self, target: Target, scores: Tensor, budget: Budget) -> Tensor:
        return scores >= self.rate(budget)

    def rescaled(self, target: Target, signals: WeightSignals, budget: Budget, q: float | Tensor) -> Decision:
        """Drop and rescale one tensor by a given q."""
        mask = self.mask(target, self.score(target, signals), budget)
        assert signals.base is not None
        weight = signals.weight  # where nothing goes it stays to the bit
        if float(q) != 1 or not bool(mask.all()):
            weight = merged(signals.base["weight"], self.changes(target, signals), mask, q).to(weight.dtype)
        return Decision(mask, {"weight": weight}, whole=True)

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        return self.rescaled(target, signals, budget, 1 - self.rate(budget) if self.q is None else self.q)


@dataclass(frozen=True)
class Darex(Dare):
    """DAREx-q: a larger q than DARE's, searched with the draws that the pruning itself will use (arXiv 2410.09344).

    Parameters
    ----------
    q
        Given, it is taken as by `Dare`, which then needs no calibration set; None searches.
    rule
        One q for the whole model (`global`), or a layer's own (`analytic`), of which eta is searched.
    search
        What is searched for on the calibration set: the model's own `loss`, which stands for the validation metric of
        the paper, or without labels the squared error of the fine-tuned model's five largest `logits`.
    bounds, step
        Range and first step of the search; by default 1 - p to 1 for q and 0.1 to 0.7 for eta.
    eta
        Given, the analytic q is not searched.
    gamma
        Probability of the bound.
    stop
        Share of rows passed that ends the grid (see `analytic_q`).
    """

    rule: Literal["global", "analytic"] = "global"
    search: Literal["loss", "logits"] = "loss"
    bounds: tuple[PositiveFloat, PositiveFloat] | None = None
    step: PositiveFloat = 0.05
    eta: FiniteFloat | None = None
    gamma: Within = 0.95
    stop: PositiveShare = 0.8

    name: ClassVar[str] = "darex"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bounds is not None and self.bounds[0] > self.bounds[1]:
            raise PrunelabError(f"darex: the bounds {self.bounds} are no range; give (low, high)")

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """The q of every target."""
        p = self.rate(probe.budget)
        if self.q is not None:
            results = dict.fromkeys((target.name for target in probe.targets), self.q)
        elif self.rule == "global":
            low, high = self.bounds or (1 - p, 1.0)
            q = search(lambda q: self.trial(probe, lambda target: q), low, high, self.step, limit=1.0)
            results = dict.fromkeys((target.name for target in probe.targets), q)
        else:
            results = self.analytic(probe, p)
        return {name: {"q": torch.tensor(q)} for name, q in results.items()}

    def analytic(self, probe: Probe, p: float) -> dict[str, float]:
        """The q of every target by the bound, under the given eta or the best."""
        means = probe.statistics({"linear": {"mean": InputMean}})
        influences: dict[str, Tensor] = {}
        biases = {t.name: t for t in probe.targets if t.unit == "tensor" and t.name.endswith(".bias")}
        for target in (target for target in probe.targets if target.unit == "linear"):
            columns = [self.changes(target, probe.signals(target)) * means[target.name]["mean"]]
            if (bias := biases.get(f"{target.name}.bias")) is not None:
                columns.append(self.changes(bias, probe.signals(bias)).unsqueeze(1))
            influences[target.name] = torch.cat(columns, 1).half()
        names = [target.name for target in probe.targets]

        def layers(eta: float) -> dict[str, float]:
            q = {k: float(analytic_q(c, p, eta, self.gamma, self.stop).mean()) for k, c in influences.items()}
            return q_by_name(names, q)

        def score(eta: float) -> float:
            result = layers(eta)
            return self.trial(probe, lambda target: result[target.name])

        if self.eta is not None:
            return layers(self.eta)
        return layers(search(score, *(self.bounds or (0.1, 0.7)), self.step))

    def trial(self, probe: Probe, q: Callable[[Target], float]) -> float:
        """The negative objective of the model pruned with these q."""
        wanted = [top_logits(probe.logits(s)) for s in probe.samples] if self.search == "logits" else []
        tried = ((t, self.rescaled(t, probe.signals(t), probe.budget, q(t))) for t in probe.targets)
        with probe.trial(tried):
            if self.search == "loss":
                errors = [float(probe.loss(sample)) for sample in probe.samples]
            else:
                errors = [logit_error(probe.logits(s), *top) for s, top in zip(probe.samples, wanted, strict=True)]
        error = sum(errors) / len(errors)
        return -error if math.isfinite(error) else -math.inf

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        return self.rescaled(target, signals, budget, signals["q"])


def top_logits(logits: Tensor, most: int = 5) -> tuple[Tensor, Tensor]:
    """The largest logits of every token and their places, both [T, most]."""
    values, indices = logits.float().topk(min(most, logits.shape[-1]))
    return values, indices


def logit_error(logits: Tensor, values: Tensor, places: Tensor) -> float:
    """Mean squared error of logits [T, V] at the places of the fine-tuned model's largest."""
    return float((logits.float().gather(-1, places) - values).square().mean())
