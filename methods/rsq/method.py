"""RSQ (Sung et al., 2025): rotate, scale, then quantise: GPTQ in which the tokens that matter count more.

The model is rotated by Hadamard matrices, which takes outliers away and leaves what it computes as it is (QuaRot). Each
token of the calibration set gets a weight by its importance, by default the attention it receives in the layer, and
enters the layer's Hessian H = 2 sum_t w_t x_t x_t^T with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Share,
)
from prunelab.common.weights.hadamard import hadamard, random_hadamard, turn
from prunelab.common.weights.obs import InverseFactor, dead, factors, falling
from prunelab.common.weights.quantisation import Quantiser, gptq
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Decision, Observation, Target, Unit, WeightSignals

Importance = Literal["attention", "parts", "norm", "change", "frequency", "distance", "product", "cluster", "alike"]
FEWER = ("change", "frequency")  # of which less counts more
INNER = ("down_proj", "down")  # linears that read what an activation function gave, which no rotation passes

# -- importance ------------------------------------------------------------------------------------------------------


def parts(length: int, chosen: tuple[int, ...], of: int, rest: bool = False) -> Tensor:
    """1 [L] in some of `of` equal parts of a sequence, 0 elsewhere; (0,) of 8 is the first eighth. rest: the last part
    also has the tokens that division leaves over, which otherwise are in none."""
    each = length // of
    part = torch.arange(length) // max(each, 1) if each else torch.full((length,), of)
    part = part.clamp_max(of - 1) if rest else part
    return torch.isin(part, torch.tensor(chosen)).float()


def distance(x: Tensor) -> Tensor:
    """Mean squared distance [L] of a token's state to all tokens' [L, D], itself included."""
    x = x.float()
    square = x.square().sum(-1)
    return square + square.mean() - 2 * (x @ x.mean(0))


def clustered(x: Tensor, clusters: int, rounds: int) -> Tensor:
    """Squared distance [L] of a token's state to the nearest of so many centres of all tokens' [L, D] (Lloyd's
    algorithm from the first tokens; a centre that no token is nearest to goes to zero, as released)."""
    x = x.float()
    centres = x[:clusters].clone()
    for _ in range(rounds):
        nearest = apart(x, centres).argmin(1)
        count = torch.bincount(nearest, minlength=len(centres)).to(x)
        centres = torch.zeros_like(centres).index_add_(0, nearest, x) / (count + 1e-8).unsqueeze(1)
    return apart(x, centres).amin(1)


def apart(x: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [L, K] of states [L, D] to centres [K, D]."""
    return x.square().sum(-1, keepdim=True) - 2 * (x @ centres.T) + centres.square().sum(-1)


def per_query(received: Tensor, root: bool = False) -> Tensor:
    """What a token received, over the number [L] of queries that can see it, or over its root."""
    later = torch.arange(len(received), 0, -1, device=received.device)
    return received / (later.sqrt() if root else later)


def stretched(scores: Tensor, low: float, high: float, quantile: float = 1.0) -> Tensor:
    """Scores [L] from their least to their greatest value stretched to `low` to `high`; with a quantile from its
    complement to it, and what lies outside at the ends. Equal scores all count `high`."""
    ends = scores.new_tensor([1 - quantile, quantile]).sort().values
    least, most = torch.quantile(scores, ends) if quantile < 1 else scores.aminmax()
    if float(most - least) == 0:
        return torch.full_like(scores, high)
    return ((scores - least) / (most - least) * (high - low) + low).clamp(low, high)


def binned(scores: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Equal steps from `low` to `high` by the quantile [L] in which a score lies."""
    inner = torch.linspace(0, 1, bins + 1, device=scores.device)[1:-1]
    return torch.linspace(low, high, bins, device=scores.device)[torch.bucketize(scores, scores.quantile(inner))]


def without_lowest(weights: Tensor, share: float, ones: bool) -> Tensor:
    """The lowest share of weights [L] becomes 0; `ones`: and the others 1."""
    lowest = weights.topk(int(len(weights) * share), largest=False).indices
    return (torch.ones_like(weights) if ones else weights).scatter(0, lowest, 0)


def mean_one(weights: Tensor) -> Tensor:
    """Weights [L] over their mean, so that damping means what it did."""
    total = weights.sum()
    if not float(total) > 0:
        raise PrunelabError("rsq: no token of a sequence counts; give longer sequences or other parts of them")
    return weights / total * len(weights)


class WeighedFactor(InverseFactor):
    """The factor of the Hessian of weighed tokens, behind a rotation of the inputs where the target has one."""

    def __init__(self, target: Target, method: RSQ) -> None:
        super().__init__(target, method.damping, method.tries, method.act_order)
        self.method, self.turned = method, method.turned(target)

    def weigh(self, observed: Observation) -> Tensor | None:
        if "weights" not in observed.memo:  # those of the layer before any of it was quantised
            observed.memo["weights"] = mean_one(self.method.weights(observed))
        weights = observed.memo["weights"]
        return weights if observed.rows is None else weights[observed.rows]

    def take(self, x: Tensor) -> None:
        super().take(turn(x, self.turned) if self.turned else x)


# -- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RSQ(WeightPruner):
    """Rotates, weighs tokens, and rounds column by column under compensation (arXiv 2503.01820).

    Parameters
    ----------
    importance
        Of a token: `attention` it receives, `parts` of the sequence, `norm` of the layer's input, minus how far the
        layer moves it (`change`), minus its `frequency` in the calibration set, mean squared `distance` to the other
        tokens, or to the nearest centre of a `cluster`; inner `product` with all tokens; `alike` counts all the same.
    side
        Whether `norm`, `distance`, `product` and `cluster` look at the layer's `input` or its `output`.
    reverse
        What would count most counts least.
    low, high, stretch
        Weights of the least and the most important token; without `stretch`, scores are weights.
    normalise
        Scores over the number of `queries` that can see the token, over their `root`, or as they are.
    scale
        Scores first `square`d, or their `root`.
    quantile, masked, truncate, bins
        Instead of the plain stretch: between these quantiles; ones but for the lowest share; zero for it; equal steps.
    parts, of, rest
        Which parts of the sequence count, for `parts`: (0, 31) of 32 are the first and the last. Tokens that division
        leaves over are in none, or in the last (`rest`). The release's `first_half` is (1,) of 2 with the rest.
    clusters, moves
        Centres of `cluster`, and how often they move.
    expand
        Every sequence is also used cyclically shifted, so many times in all (8 in the paper's expansion).
    rotation
        Of the model: randomised `hadamard` matrices, any `random` ones, or `none`.
    online
        Also rotate what reads an activation function or heads, which whoever computes with the codes has to do, too.
    symmetric, group, search, steps, shrink, power, act_order, damping, tries, width
        Of the grids and the solver, as in GPTQ.
    """

    importance: Importance = "attention"
    side: Literal["input", "output"] = "input"
    reverse: bool = False
    low: NonNegativeFloat = 0.005
    high: PositiveFloat = 1.0
    stretch: bool = True
    normalise: Literal["none", "queries", "root"] = "none"
    scale: Literal["none", "square", "root"] = "none"
    quantile: Share = 1.0
    masked: Share = 0.0
    truncate: Share = 0.0
    bins: NonNegativeInt = 0
    parts: tuple[NonNegativeInt, ...] = (0,)
    of: PositiveInt = 8
    rest: bool = False
    clusters: PositiveInt = 100
    moves: NonNegativeInt = 30
    expand: PositiveInt = 1
    rotation: Literal["hadamard", "random", "none"] = "hadamard"
    online: bool = True
    symmetric: bool = True
    group: NonNegativeInt = 0
    search: bool = True
    steps: PositiveInt = 100
    shrink: PositiveShare = 0.8
    power: PositiveFloat = 2.4
    act_order: bool = False
    damping: NonNegativeFloat = 0.01
    tries: PositiveInt = 49
    width: PositiveInt = 128

    name: ClassVar[str] = "rsq"
    quantises = True
    in_turn = True
    exempt = {"keep_all": "no number of bits is the identity", "budget": "weights become codes, and all stay"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise PrunelabError("rsq: weights of tokens go from low up to high")
        if self.quantile == 0.5 or self.masked == 1 or self.truncate == 1 or self.bins == 1:
            raise PrunelabError("rsq: quantile is not 0.5, masked and truncate are below 1, bins 2 or more")
        if not self.parts or max(self.parts) >= self.of:
            raise PrunelabError(f"rsq: parts are numbers below of ({self.of})")
        if self.reverse and self.importance == "norm" and self.scale == "root":
            raise PrunelabError("rsq: norms the other way round are negative and have no root; give scale='none'")
        if not self.stretch and (self.reverse or self.importance in (*FEWER, "product")):
            raise PrunelabError("rsq: weights of tokens are not negative; stretch scores that can be")

    def quantiser(self, budget: Budget) -> Quantiser:
        """The grids under a budget of whole bits."""
        grid = (self.symmetric, self.group, self.search, self.steps, self.shrink, self.power)
        return Quantiser(int(budget.amounts[0]), *grid, sign=False, centred=self.symmetric)

    # rotate

    def rotations(self, widths: Mapping[str, int], rng: torch.Generator) -> Mapping[str, Tensor]:
        if self.rotation == "none":
            return {}
        if "residual" not in widths:
            raise PrunelabError("rsq: no rotation of this model leaves what it computes as it is; give rotation='none'")
        if self.rotation == "random":
            return {n: torch.linalg.qr(torch.randn(c, c, generator=rng)).Q for n, c in sorted(widths.items())}
        results = {"residual": random_hadamard(widths["residual"], rng)}
        return {**results, "values": hadamard(widths["values"])} if "values" in widths else results

    def turned(self, target: Target) -> int:
        """How far apart the columns lie that a linear's own rotation mixes; 0 where it has none."""
        if self.rotation != "hadamard" or not self.online:
            return 0
        return 1 if target.role.rpartition(".")[2] in INNER else target.span if 1 < target.span < target.shape[1] else 0

    # scale

    def prepared(self, samples: list[Any]) -> list[Any]:
        if self.expand > 1 and any(not isinstance(s, Tensor) or s.dim() != 1 for s in samples):
            raise PrunelabError("rsq: only sequences of tokens can be shifted; leave expand out")
        return [s.roll(len(s) // self.expand * m) if m else s for m in range(self.expand) for s in samples]

    def weights(self, observed: Observation) -> Tensor:
        """The weights [L] of a sequence's tokens in a layer."""
        length, device = len(observed.before), observed.before.device
        if self.importance == "parts":
            return parts(length, self.parts, self.of, self.rest).to(device)
        if self.importance == "alike":
            return torch.ones(length, device=device)
        return self.shaped(self.scores(observed).float())

    def scores(self, observed: Observation) -> Tensor:
        """What the importance [L] of a sequence's tokens in a layer is measured by."""
        if self.importance == "attention":
            return observed.attention
        if self.importance == "frequency":
            return observed.frequencies
        before, after = observed.before.float(), observed.after.float()
        if self.importance == "change":
            return (before - after).norm(dim=-1)
        seen = before if self.side == "input" else after
        if self.importance == "distance":
            return distance(seen)
        if self.importance == "cluster":
            return clustered(seen, self.clusters, self.moves)
        return seen.norm(dim=-1) if self.importance == "norm" else seen @ seen.sum(0)

    def shaped(self, scores: Tensor) -> Tensor:
        """Weights [L] of scores. Norms and products change sign before they are scaled, all others after it."""
        sign = -1 if self.reverse != (self.importance in FEWER) else 1
        early = self.importance in ("norm", "product")
        scores = scores * sign if early else scores
        scores = {"none": scores, "square": scores.square(), "root": scores.clamp_min(0).sqrt()}[self.scale]
        scores = scores if early else scores * sign
        scores = scores if self.normalise == "none" else per_query(scores, self.normalise == "root")
        weights = stretched(scores, self.low, self.high, self.quantile) if self.stretch else scores
        if self.masked or self.truncate:
            return without_lowest(weights, self.masked or self.truncate, bool(self.masked))
        return binned(weights, self.low, self.high, self.bins) if self.bins else weights

    # quantise

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return factors(lambda target: WeighedFactor(target, self))

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        budgets = super().allocate(targets, signals, budget)
        for each in {*budgets}:
            self.quantiser(each)  # refuses a single bit, which has no symmetric grid
        return budgets

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """|w|: what rounding may err by grows with it."""
        return signals.weight.float().abs()

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        apart, diagonal = self.turned(target), signals["diagonal"]
        weight = turn(signals.weight.float(), apart) if apart else signals.weight
        order = falling(diagonal) if self.act_order else None
        code = gptq(weight, signals["factor"], self.quantiser(budget), self.width, order, dead=dead(diagonal))
        return Decision(torch.ones(target.shape, dtype=torch.bool), code=replace(code, turned=apart))
