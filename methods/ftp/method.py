"""FTP (Li et al., 2024): a router decides for every token and block whether the block is worth computing.

Unit: a token of the prompt. Where it skips a block it passes by attention and MLP as it is, and the others do not see
it there. One tiny network routes all blocks, from four numbers a token: its place, the attention that it last got, the
rank of that, and the share of tokens that the block is to skip. A genetic search finds the shares of the blocks.
Training has three losses and leaves the model as it is.

A reconstruction from reviews of the paper: no code, and no weights of losses or settings of the search, were released.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core import evolution
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveInt, PositiveShare, Share
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.core.signals import Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.training.distillation import distillation
from prunelab.common.training.parametrizations import straight_through


def priority(real: Tensor) -> Tensor:
    """The static router's ranking [B, N] of tokens, the higher the sooner kept: the first of all, then from the last
    one backwards. real [B, N] bool: what is no padding."""
    indices = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    first = indices == real.int().argmax(1, keepdim=True)
    return indices.float().masked_fill(first, real.shape[1])


def shares(weights: Sequence[float], mean: float, most: float = 1.0) -> list[float]:
    """The share of tokens that each block skips, in proportion to its weight, with that mean and none above `most`, of
    which others take the rest."""
    if mean > most + 1e-9:
        raise PrunelabError(f"ftp: blocks skip at most {most:g} of the tokens, and {mean:g} is asked for; keep more")
    result, left, free = [most] * len(weights), mean * len(weights), list(range(len(weights)))
    while free:
        total = sum(weights[i] for i in free)
        part = {i: left * weights[i] / total if total else left / len(free) for i in free}
        full = [i for i in free if part[i] > most]
        if not full:
            for i in free:
                result[i] = part[i]
            break
        left, free = left - most * len(full), [i for i in free if i not in full]
    return result


def searched(
    cost: Callable[[tuple[float, ...]], float],
    start: Sequence[float],
    genetic: evolution.Genetic,
    levels: int = 20,
    exchanges: int = 3,
    seed: int = 0,
) -> tuple[float, ...]:
    """The shares of the blocks at which a cost is least, of equal mean as those to start from. Genes are shares in
    steps of 1 / levels; mutation moves steps between blocks, and a crossing gets back the sum that it lost."""
    low, high = [0] * len(start), [levels] * len(start)
    wanted = round(sum(start) * levels)

    def summed(genes: evolution.Genes) -> evolution.Genes:
        results = list(genes)
        while (apart := wanted - sum(results)) != 0:
            step = 1 if apart > 0 else -1
            room = [i for i in range(len(results)) if 0 <= results[i] + step <= levels]
            results[max(room, key=lambda i: -step * results[i])] += step
        return tuple(results)

    def mutated(genes: evolution.Genes, rng: random.Random) -> evolution.Genes:
        return evolution.exchanged(genes, rng, low, high, exchanges=rng.randint(1, exchanges))

    first = summed(tuple(min(levels, round(share * levels)) for share in start))
    best = genetic.best([first], lambda genes: cost(tuple(g / levels for g in genes)), mutated, summed, seed)
    return tuple(gene / levels for gene in best)


class Router(nn.Module):
    """The router of all blocks: two layers, from the four factors to the logits of skip and keep. weights: how much
    each block skips in relation to the others, as the search found it; numbers, since they decide shapes."""

    def __init__(self, blocks: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, hidden), nn.Linear(hidden, 2)
        self.weights = (1.0,) * blocks

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.weights)

    def set_extra_state(self, state: Tensor) -> None:
        self.weights = tuple(state.tolist())

    def forward(self, factors: Tensor) -> Tensor:
        """Factors [B, N, 4] -> logits [B, N, 2]."""
        logits: Tensor = self.outer(F.relu(self.inner(factors.to(self.inner.weight.dtype))))
        return logits.float()


@dataclass(frozen=True)
class FTP(TokenPruner):
    """FTP (arXiv 2412.11494), a reconstruction. Its router (`build`) is trained on the frozen model.

    The budget is the share of tokens that goes through a block, in the mean over the blocks that route; the paper's
    sparsity is the rest. The first block computes all: there is no attention to read before it.

    Parameters
    ----------
    layers
        Blocks that route; empty: all but the first.
    router
        `learned`, the `static` one whose order is fixed, which needs no training, or a `random` one.
    schedule
        How much each of these blocks skips in relation to the others; empty: what the router's search found, or alike.
    most
        The largest share of tokens that a block may skip.
    decides
        `budget`: as many tokens as the schedule says go through, the likeliest first. `router`: those that it would
        rather keep, however many these are.
    hidden
        Of the router.
    guide, constraint, distil
        Weights of the three losses.
    """

    layers: tuple[PositiveInt, ...] = ()
    router: Literal["learned", "static", "random"] = "learned"
    schedule: tuple[NonNegativeFloat, ...] = ()
    most: PositiveShare = 1.0
    decides: Literal["budget", "router"] = "budget"
    threshold: Share = 0.5
    hidden: PositiveInt = 64
    guide: NonNegativeFloat = 1.0
    constraint: NonNegativeFloat = 1.0
    distil: NonNegativeFloat = 1.0

    name: ClassVar[str] = "ftp"
    rest = "bypass"
    distils = True

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layers = self.layers or tuple(range(1, info.depth))
        if self.schedule and len(self.schedule) != len(layers):
            raise PrunelabError(
                f"ftp: the schedule names {len(self.schedule)} blocks, and {len(layers)} blocks route; name each once"
            )
        return [Site(layer, "input") for layer in layers]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"last_row"} if self.router == "learned" else ())

    def build(self, info: ModelInfo) -> nn.Module | None:
        return Router(len(self.sites(info)), self.hidden) if self.router == "learned" else None

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        weights = self.schedule or (signals.parts.weights if self.router == "learned" else ())
        kept_share = (
            float(budget.amounts[0]) if budget.unit == "ratio" else budget.count(signals.units) / max(1, signals.units)
        )
        skipped = 1 - kept_share
        if len(set(weights)) > 1:
            skipped = shares(weights, skipped, self.most)[site.index]
            budget = Budget(1 - skipped)
        elif skipped > self.most:
            raise PrunelabError(f"ftp: blocks skip at most {self.most:g} of the tokens; keep more")
        if self.router != "learned":
            return Plan(signals.keep(budget, scores=self.fixed(signals)), rest="bypass")
        with torch.set_grad_enabled(signals.training):
            logits = signals.parts(self.factors(site, signals, skipped))
            likely = logits.softmax(-1)[..., 1]
            if signals.training:
                return self.routed(site, signals, budget, skipped, logits, likely)
        if self.decides == "router" and skipped:
            kept = signals.keep(mask=likely > self.threshold)
        else:
            kept = signals.keep(budget, scores=likely)
        signals.state["went"] = (site.layer, chosen(kept, likely))
        return Plan(kept, rest="bypass")

    def fixed(self, signals: TokenSignals) -> Tensor:
        """Scores [B, N] of a router that reads nothing."""
        if self.router == "random":
            shape, device = signals.prunable.shape, signals.prunable.device
            return torch.rand(shape, generator=signals.rng, device=device)
        return priority(real(signals))

    def factors(self, site: Site, signals: TokenSignals, skipped: float) -> Tensor:
        """The router's input [B, N, 4]: place, attention, its rank, and the share to skip.

        Attention is what the last token of the prompt pays, in the mean over heads, in the last block that a token went
        through.
        """
        # assumption: of the paper nothing says whose attention it is, nor how it is scaled
        state, here, known = signals.state, real(signals), signals.last_row.float().mean(1)
        layer, went = state.get("went", (-1, None))
        if went is not None and layer == site.layer - 1:
            known = torch.where(went, known, state["attention"])
        state["attention"] = known.detach()
        count = here.sum(1, keepdim=True).clamp_min(2)
        place = (here.cumsum(1) - 1) / (count - 1)
        rank = known.masked_fill(~here, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1) / (count - 1)
        return torch.stack([place, (known * count).log1p(), rank, torch.full_like(place, skipped)], -1)

    def routed(
        self, site: Site, signals: TokenSignals, budget: Budget, skipped: float, logits: Tensor, likely: Tensor
    ) -> Plan:
        """While training: the router's own decision as a gate, with the gradient of its probability."""
        free = signals.prunable
        gate = straight_through((likely > self.threshold) | ~free, likely.masked_fill(~free, 1))
        static = chosen(signals.keep(budget, scores=priority(real(signals))), likely)
        signals.state.setdefault("routed", []).append((logits[free], static[free].long(), gate[free], skipped))
        signals.state["went"] = (site.layer, gate.detach() > 0)
        return Plan(signals.keep(mask=free), rest="bypass", gate=gate)

    def loss(self, outputs: Any, taught: Any, state: Mapping[str, Any], budget: Budget) -> Tensor:
        """What imitates the static router, what asks for as many skipped tokens as are due, and no fewer, and the
        distance to what the unpruned model says."""
        if "routed" not in state:
            raise PrunelabError(f"{self.name} learns in training mode alone; call model.train() first")
        guide = torch.stack([F.cross_entropy(logits, static) for logits, static, _, _ in state["routed"]]).mean()
        short = torch.stack([(due - (1 - gate).mean()).clamp_min(0) for _, _, gate, due in state["routed"]]).mean()
        apart = distillation(outputs.logits, taught.logits)
        return self.guide * guide + self.constraint * short + self.distil * apart


def real(signals: TokenSignals) -> Tensor:
    """Which tokens [B, N] are no padding."""
    return torch.ones_like(signals.prunable) if signals.valid is None else signals.valid


def chosen(kept: Any, like: Tensor) -> Tensor:
    """The tokens [B, N] that a selection names, as a mask."""
    marks = torch.ones_like(kept.index) if kept.valid is None else kept.valid.long()
    return torch.zeros(like.shape, dtype=torch.long, device=like.device).scatter_add(1, kept.index, marks) > 0
