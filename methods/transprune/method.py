"""TransPrune (Li et al., CVPR 2026): a visual token matters as much as a decoder's layers change it, and as the
instruction behind it attends to it.

Unit: a visual token of the decoder's sequence. Transitions are added up over some middle layers, and tokens leave at
three of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt, Share
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Terms = Literal["both", "magnitude", "direction"]
Angle = Literal["signed", "absolute"]
SUBLAYERS = ("attention", "mlp")


def transition(
    before: Tensor, after: Tensor, among: Tensor | None = None, terms: Terms = "both", angle: Angle = "signed"
) -> Tensor:
    """Token transition [B, N] of a sublayer that makes `after` of `before`, both [B, N, D]: the ratio of their norms
    times the softmax of one minus their cosine (`absolute`: minus its size, as written).

    The softmax runs over all tokens of the batch, as released, or over those [B, N] of each sample that are `among`
    the others; the rest is zero.
    """
    magnitude = after.norm(dim=-1) / before.norm(dim=-1).clamp_min(torch.finfo(before.dtype).tiny)
    cosine = torch.cosine_similarity(before, after, dim=-1)
    turn = (1 - (cosine if angle == "signed" else cosine.abs())).exp()
    if among is None:
        direction = turn / turn.sum()
    else:
        turn, magnitude = turn * among, magnitude * among
        direction = turn / turn.sum(1, keepdim=True).clamp_min(torch.finfo(turn.dtype).tiny)
    return {"both": magnitude * direction, "magnitude": magnitude, "direction": direction}[terms]


def guidance(rows: Tensor) -> Tensor:
    """Instruction-guided attention [B, N]: what the text behind the picture pays each token in the coming layer, for
    its rows [B, H, R, N], in the mean over heads and rows."""
    return rows.float().mean(1).sum(1) / max(rows.shape[2], 1)


def normalised(scores: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Scores [B, M] as shares of their sum."""
    return scores / (scores.sum(-1, keepdim=True) + epsilon)


@dataclass(frozen=True)
class TransPrune(TokenPruner):
    """TransPrune (arXiv 2507.20630): drops visual tokens within the decoder by how much its layers change them, summed
    over layers, and by the attention of the instruction.

    The budget is what is left of a picture's tokens at each of the layers, one amount for all or one a layer: 0.875,
    0.625 and 0.125 as released.

    Parameters
    ----------
    layers : tuple of int
        The layers, from 0, before which tokens leave: behind the paper's 7th, 9th and 12th.
    first : int
        The first layer, from 0, whose transitions count; all up to the last of `layers` do.
    alpha : float
        Weight of transitions; the rest is the attention's. 0 is attention alone.
    terms : {"both", "magnitude", "direction"}
        What a transition is made of.
    angle : {"signed", "absolute"}
        One minus the cosine, as released, or minus its size, as written.
    among : {"sequence", "image"}
        What the softmax of directions runs over: all tokens of a sample, as released, or the visual ones, as written.
    accumulate : bool
        Whether layers add up; otherwise the last one before each cut counts.
    epsilon : float
        Added to what is divided by.
    positions : str
        The tokens that are left are numbered anew, as released, or keep their numbers.
    """

    layers: tuple[PositiveInt, ...] = (7, 9, 12)
    first: NonNegativeInt = 6
    alpha: Share = 0.5
    terms: Terms = "both"
    angle: Angle = "signed"
    among: Literal["sequence", "image"] = "sequence"
    accumulate: bool = True
    epsilon: PositiveFloat = 1e-8
    positions: Positions = "renumber"

    name: ClassVar[str] = "transprune"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if not self.layers or sorted({*self.layers}) != [*self.layers] or self.first >= self.layers[0]:
            raise PrunelabError(f"{self.name}: `layers` have to rise, and `first` to come before them")
        return [Site(layer, "input") for layer in self.layers]

    def seen(self, site: Site) -> Sequence[int]:
        """The layers whose transitions are read at a site: those since the one before."""
        if not self.alpha:
            return []
        since = max((layer for layer in self.layers if layer < site.layer), default=self.first)
        return range(since if self.accumulate else site.layer - 1, site.layer)

    def requires(self, site: Site) -> frozenset[Signal]:
        parts = [f"{part}_{end}" for part in SUBLAYERS for end in ("input", "output")]
        return frozenset({"coming_text", *(Reading(name, layer) for layer in self.seen(site) for name in parts)})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        every = signals.state.setdefault("every", signals.available())  # of each sample's pictures, before any left
        visual = signals.candidates()
        score = (1 - self.alpha) * normalised(
            self.of_visual(guidance(signals.coming_text), visual, signals), self.epsilon
        )
        if self.alpha:
            moved = self.of_visual(self.transitions(site, signals), visual, signals)
            score = score + self.alpha * normalised(moved, self.epsilon)
        whole = torch.zeros_like(signals.prunable, dtype=torch.float32).scatter(1, visual, score)
        return Plan(signals.keep([budget.count(n) for n in every], scores=whole), positions=self.positions)

    def of_visual(self, scores: Tensor, visual: Tensor, signals: TokenSignals) -> Tensor:
        """Scores [B, N] of the visual tokens [B, M] alone."""
        return (scores * signals.prunable).gather(1, visual)

    def transitions(self, site: Site, signals: TokenSignals) -> Tensor:
        """What the tokens at hand have gone through so far, [B, N]."""
        real = torch.ones_like(signals.prunable) if signals.valid is None else signals.valid
        among = real if self.among == "sequence" else signals.prunable
        new = torch.zeros_like(real, dtype=torch.float32)
        for layer in self.seen(site):
            for part in SUBLAYERS:
                before, after = (signals.at(Reading(f"{part}_{end}", layer)).float() for end in ("input", "output"))
                new = new + transition(before, after, among, self.terms, self.angle)
        if not self.accumulate:
            return new
        assert signals.indices is not None
        whole = signals.state.get("transitions", torch.zeros_like(new))  # of the tokens as they were at the first cut
        whole = whole.scatter_add(1, signals.indices, new * real)
        signals.state["transitions"] = whole
        return whole.gather(1, signals.indices)
