"""MC-MoE (Huang et al., ICLR 2025): experts of one, two or three bits, and fewer experts for tokens that need no two.

Before loading, every expert gets bits by an integer programme over how often and how strongly it is used and what
fewer bits cost it, and is rounded by GPTQ. While the model runs, tokens whose second expert weighs little leave it out,
unless they are important.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import Site
from prunelab.common.experts.role import ExpertPruner, ExpertSignals
from prunelab.common.weights.obs import InverseFactor, dead, factors
from prunelab.common.weights.quantisation import Quantiser, gptq
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Decision, Probe, Statistics, Target, Unit, WeightSignals
from prunelab.methods.mc_moe.allocation import (
    BlockScore,
    Curvature,
    QuantisationErrors,
    Significance,
    allocated,
    by_blocks,
    costs,
)

Bits = Annotated[int, Interval(ge=1, le=8)]
FEW = 3  # bits up to which the release lets columns of a block not make up for each other


@dataclass(frozen=True)
class MixtureCompressor(WeightPruner):
    """Pre-loading mixed-precision quantisation (PMQ, arXiv 2410.06270). The budget is the bits that a weight of an
    expert has on average: 2.5bits are 20 bits for eight experts.

    Parameters
    ----------
    choices
        Bits that an expert can have; at least one expert of each in `least_one`.
    alpha, beta, gamma
        Exponents of usage, router weight and quantisation error. As released, the paper's gamma of 2 is not used, and
        without one the exponent of the error is alpha, too.
    worth
        What decides an expert's bits: what it is worth as `released`, or, of the baselines in the paper's tables, the
        curvature of its loss (`hessian`, HAWQ-V2) or how much its mixture turns what passes it (`blocks`, where whole
        mixtures have two bits or four).
    attention
        Bits of all other linears.
    group
        Columns that share a grid; of the errors as well.
    batch
        Calibration sequences over which an error is one norm.
    within
        Columns of a block make up for each other: `all`, or those of linears of more than three bits alone, as
        `released`.
    damping, width
        Of the solver, as in GPTQ.
    """

    choices: tuple[Bits, ...] = (1, 2, 3)
    least_one: tuple[Bits, ...] = (3, 2)
    alpha: NonNegativeFloat = 1.0
    beta: NonNegativeFloat = 1.5
    gamma: NonNegativeFloat | None = None
    worth: Literal["released", "hessian", "blocks"] = "released"
    attention: Bits = 4
    group: PositiveInt = 128
    batch: PositiveInt = 8
    within: Literal["released", "all"] = "released"
    damping: NonNegativeFloat = 0.01
    width: PositiveInt = 128

    name: ClassVar[str] = "mc_moe"
    quantises = True
    exempt = {"keep_all": "no number of bits is the identity", "budget": "weights become codes, and all stay"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.choices or not {*self.least_one} <= {*self.choices}:
            raise PrunelabError(f"mc_moe: least_one {self.least_one} are not among the choices {self.choices}")

    @property
    def units(self) -> Sequence[Unit]:
        return ("experts", "linear")  # experts are looked at, and their linears rounded

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return factors(lambda target: InverseFactor(target, self.damping)) if unit == "linear" else {}

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """The bits of every expert, from the dense model's routing and outputs."""
        mixtures = [target for target in probe.targets if target.unit == "experts"]
        if self.worth == "blocks":
            scores = probe.statistics({"experts": {"score": BlockScore}})
            mean = probe.budget.amounts[0]
            bits = by_blocks([float(scores[target.name]["score"]) for target in mixtures], mean)
            return self.of_experts(probe, {t.block: [b] * t.units for t, b in zip(mixtures, bits, strict=True)})
        results = {}
        for target, cost in zip(mixtures, self.costs(probe, mixtures), strict=True):
            total = int(round(probe.budget.at(target.block).amounts[0] * target.units, 6))
            results[target.block] = allocated(cost, self.choices, total, self.least_one)
        return self.of_experts(probe, results)

    def costs(self, probe: Probe, mixtures: Sequence[Target]) -> list[Tensor]:
        """What each choice of bits costs each expert [E, choices], mixture by mixture."""
        if self.worth == "hessian":
            curved = probe.statistics({"experts": {"errors": lambda t: Curvature(t, self.choices, self.group)}})
            return [curved[target.name]["errors"] for target in mixtures]
        wanted: Mapping[str, Callable[[Target], Accumulator]] = {
            "significance": Significance,
            "errors": lambda target: QuantisationErrors(target, self.choices, self.group, self.batch),
        }
        seen = probe.statistics({"experts": wanted})
        results = []
        for target in mixtures:
            usage, mass = seen[target.name]["significance"]
            results.append(self.cost(usage, mass, seen[target.name]["errors"]))
        return results

    def cost(self, usage: Tensor, mass: Tensor, errors: Tensor) -> Tensor:
        """What each choice of bits costs the experts of a mixture [E, choices]."""
        gamma = self.alpha if self.gamma is None else self.gamma
        return costs(usage, mass, errors, self.alpha, self.beta, gamma)

    def of_experts(self, probe: Probe, bits: Mapping[int, Sequence[int]]) -> dict[str, Statistics]:
        """The bits of every expert, where `allocate` finds them: with its linears."""
        return {t.name: {"bits": torch.tensor(bits[t.block])} for t in probe.targets if t.expert >= 0}

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        def of(target: Target, known: WeightSignals) -> Budget:
            if target.unit == "experts":
                return Budget(1.0)
            return Budget(self.attention if target.expert < 0 else int(known["bits"][target.expert]), "bits")

        return [of(target, known) for target, known in zip(targets, signals, strict=True)]

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """All alike: what is worth how many bits is decided beforehand."""
        return torch.ones(target.shape)

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        everything = torch.ones(target.shape, dtype=torch.bool)
        if target.unit == "experts":
            return Decision(everything)
        bits = int(budget.amounts[0])
        code = gptq(
            signals.weight,
            signals["factor"],
            Quantiser(bits, group=self.group),
            self.width,
            dead=dead(signals["diagonal"]),
            within=self.within == "all" or bits > FEW,
        )
        return Decision(everything, code=code)


# -- while the model runs --------------------------------------------------------------------------------------------

# Median of w1 / w0 in each layer of Mixtral-8x7B (Lu et al.), as the release has them.
MIXTRAL = (
    0.402, 0.494, 0.463, 0.484, 0.478, 0.491, 0.523, 0.521, 0.544, 0.570, 0.574, 0.489, 0.503, 0.618, 0.568, 0.535,
    0.559, 0.519, 0.537, 0.487, 0.469, 0.461, 0.461, 0.469, 0.458, 0.418, 0.433, 0.418, 0.406, 0.433, 0.447, 0.535,
)  # fmt: skip
# Its layers, those first that lose least by leaving experts out, as the release has measured it.
LEAST_LOSS = (
    14,
    24,
    13,
    26,
    22,
    25,
    27,
    28,
    11,
    23,
    9,
    15,
    10,
    12,
    8,
    21,
    16,
    20,
    17,
    6,
    18,
    7,
    5,
    29,
    19,
    3,
    30,
    4,
    2,
    31,
    1,
    0,
)


def token_importance(norms: Tensor, received: Tensor | None, valid: Tensor) -> Tensor:
    """I [B, N] of a prompt's tokens (equation 6): L1 norm times the mean attention received from later ones. As
    released (None) that attention is 1 over the number of tokens from this one on, since it sums over the keys of a
    query, where it should over the queries of a key."""
    later = valid.flip(1).cumsum(1).flip(1).clamp_min(1)
    return norms / later if received is None else norms * received


def ranks(scores: Tensor) -> Tensor:
    """The place [B, N] of every score among its row's, from 0 for the highest."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


@dataclass(frozen=True)
class OnlineDynamicPruning(ExpertPruner):
    """Online dynamic pruning of a token's second and further experts (ODP, arXiv 2410.06270).

    Parameters
    ----------
    thresholds
        One a mixture layer: an expert goes whose weight is below it times that of the token's first. `mixtral` are the
        release's, of Mixtral-8x7B. Without any, the budget says which share of the choices stays, and those go first
        whose weight is least beside the first.
    protect, drop
        Shares of a prompt's tokens, the most important of which keep all experts and the least important lose all.
    importance
        By the L1 norm and `attention` received, as the paper says, or as `released`.
    layers
        Mixture layers that are pruned; all by default. `mixtral` are `most` of Mixtral-8x7B's, those that lose least
        (10 in the release's example; 20 by default in its class).
    """

    thresholds: tuple[NonNegativeFloat, ...] | Literal["mixtral"] = ()
    protect: Share = 0.02
    drop: Share = 0.0
    importance: Literal["released", "attention"] = "released"
    layers: tuple[NonNegativeInt, ...] | Literal["mixtral"] = ()
    most: PositiveInt = 10

    name: ClassVar[str] = "odp"

    def requires(self, site: Site) -> frozenset[str]:
        self.threshold(site)  # refuses a list that is too short, before anything runs
        if not (self.protect or self.drop):
            return frozenset()
        return frozenset({"norms", "received"} if self.importance == "attention" else {"norms"})

    def threshold(self, site: Site) -> float | None:
        """Of a layer; None where the budget decides."""
        given = MIXTRAL if self.thresholds == "mixtral" else self.thresholds
        if not given:
            return None
        if site.index >= len(given):
            raise PrunelabError(
                f"odp: {len(given)} thresholds do not reach mixture layer {site.index}; give one a layer"
            )
        return float(given[site.index])

    def plan(self, site: Site, signals: ExpertSignals, budget: Budget) -> Tensor:
        weights = signals.weights
        everything = torch.ones_like(weights, dtype=torch.bool)
        layers = LEAST_LOSS[: self.most] if self.layers == "mixtral" else self.layers
        if layers and site.index not in layers:
            return everything
        first = torch.zeros_like(everything).scatter_(1, weights.argmax(1, keepdim=True), True)
        share = (weights / weights.amax(1, keepdim=True)).float().masked_fill(first, torch.inf)
        keep, lose = self.marked(signals)
        threshold = self.threshold(site)
        if threshold is None:
            share = share.masked_fill(keep.unsqueeze(1), torch.inf)
            best = share.flatten().topk(budget.count(share.numel())).indices
            kept = first | torch.zeros_like(everything).flatten().scatter(0, best, True).view_as(first)
        else:
            kept = share >= threshold
        return (kept & ~lose.unsqueeze(1)) | keep.unsqueeze(1)

    def marked(self, signals: ExpertSignals) -> tuple[Tensor, Tensor]:
        """Tokens [T] that keep all their experts, and those that lose all. None while single tokens are written."""
        weights = signals.weights
        none = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
        if not signals.prefill or not (self.protect or self.drop):
            return none, none
        real = ~none.view(signals.batch, -1) if signals.valid is None else signals.valid
        received = signals.received.view_as(real) if self.importance == "attention" else None
        scores = token_importance(signals.norms.view_as(real), received, real.long())
        length = real.sum(1, keepdim=True).double()
        keep = ranks(scores.masked_fill(~real, -torch.inf)) < (self.protect * length).floor()
        lose = ranks((-scores).masked_fill(~real, -torch.inf)) < (self.drop * length).floor()
        return (keep & real).flatten(), (lose & real).flatten()
