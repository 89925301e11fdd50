"""HiPrune (Liu et al., 2025): layers of an image encoder look at different things, and three of them are worth keeping.

Unit: a visual token of one crop. Middle layers look at the object (anchors, with the buffers around them), the last one
at the whole image (registers). No class token is asked, and no text but by HiPrune++.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Positions, Site, take
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Edges = Literal["clamp", "drop"]
PARTS = 5  # an anchor and its four neighbours


def importance(received: Tensor) -> Tensor:
    """What orders tokens [B, N]: the attention [B, H, N] that each receives from all queries, averaged over heads. (The
    mean over queries, which the paper takes, orders them alike.)"""
    return received.float().mean(1)


def anchor_count(keep: int, alpha: float) -> int:
    """Anchors among `keep` tokens, half to even: with their neighbours they are a share alpha of them."""
    return min(round(keep * alpha / PARTS), keep)


def with_neighbours(anchors: Tensor, total: int, width: int, edges: Edges) -> Tensor:
    """Mask [B, N] of anchors [B, A] and of the tokens beside, above and below them in a grid of N tokens, in rows.

    Left and right are the tokens before and after: a row's last token has the next row's first beside it. A neighbour
    outside the grid is its first or last token (`clamp`, as released), or there is none (`drop`, as written).
    """
    around = torch.tensor([0, -1, 1, -width, width], device=anchors.device)
    indices = (anchors.unsqueeze(-1) + around).flatten(1)  # [B, 5 * A]
    if edges == "clamp":
        indices = indices.clamp(0, total - 1)
    indices = indices.masked_fill((indices < 0) | (indices >= total), total)  # a spare place behind the last
    mask = torch.zeros(len(anchors), total + 1, dtype=torch.bool, device=anchors.device)
    return mask.scatter(1, indices, True)[:, :total]


def ranked(
    middle: Tensor, last: Tensor, keep: int, alpha: float, width: int, edges: Edges = "clamp", buffers: bool = True
) -> Tensor:
    """Scores [B, N] whose `keep` largest are HiPrune's: anchors are the best in the object layer [B, N], buffers their
    neighbours, and registers the best of the others in the last layer [B, N]. Where there is no room for all, anchors
    go before buffers."""
    anchors = selection.descending(middle)[:, : anchor_count(keep, alpha)]
    if buffers:
        last = last.masked_fill(with_neighbours(anchors, last.shape[1], width, edges), torch.finfo(last.dtype).max)
    return last.scatter(1, anchors, float("inf"))


def with_text(scores: Tensor, keep: int, tokens: Tensor, text: Tensor) -> Tensor:
    """HiPrune++: scores [B, N] whose first `keep` are the same and whose next are the tokens [B, N, D] most like the
    text [B, D], by cosine."""
    kept, _ = selection.top_k(scores, keep)
    like = torch.cosine_similarity(tokens.float(), text.float().unsqueeze(1), dim=-1)
    return like.scatter(1, kept, float("inf"))


@dataclass(frozen=True)
class HiPrune(TokenPruner):
    """HiPrune (arXiv 2508.00553): keeps the tokens that a middle layer of the image encoder attends to with their
    neighbours, and those that its last layer attends to, of every crop as many.

    Parameters
    ----------
    alpha : float
        Share of the budget that goes to anchors and buffers.
    layer : int
        The object layer, counted from 0: the paper's 9th for CLIP; its 16th for Qwen2.5-VL is 15.
    edges : {"clamp", "drop"}
        A neighbour outside the grid is the nearest end of the sequence, as released, or left out, as written.
    buffers : bool
        Whether an anchor's neighbours are kept with it (the paper's table 6 has it without).
    beta : float
        HiPrune++ (0.1 in the paper): so large a share of the budget is kept besides, by likeness to the text.
    divisor : int
        What beta is divided by: 1 by the text of the paper, 5 by its pseudo-code.
    positions : str
        The kept tokens are numbered anew, as released for LLaVA, or keep their numbers, as for Qwen2.5-VL.
    """

    alpha: Share = 0.1
    layer: NonNegativeInt = 8
    edges: Edges = "clamp"
    buffers: bool = True
    beta: NonNegativeFloat = 0.0
    divisor: PositiveInt = 1
    positions: Positions = "renumber"

    name: ClassVar[str] = "hiprune"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[Signal]:
        read: set[Signal] = {Reading("received", self.layer, "tower"), Reading("received", -1, "tower")}
        return frozenset(read | {"hidden", "text"} if self.beta else read)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        visual, crops = signals.candidates(), len(signals.grids)  # [B, M]
        middle, last = (
            importance(signals.at(Reading("received", layer, "tower"))).gather(1, visual) for layer in (self.layer, -1)
        )
        if signals.valid is not None:
            middle = middle.masked_fill(~signals.prunable.gather(1, visual), float("-inf"))
        middle, last = (x.unflatten(1, (crops, -1)).flatten(0, 1) for x in (middle, last))  # a crop a row
        keep = budget.count(signals.units) // crops
        scores = ranked(middle, last, keep, self.alpha, signals.grids[0][1], self.edges, self.buffers)
        more = round(self.beta * keep / self.divisor)
        if more:
            tokens = take(signals.hidden, visual).unflatten(1, (crops, -1)).flatten(0, 1)
            scores = with_text(scores, keep, tokens, signals.text.repeat_interleave(crops, 0))
        if crops > 1:
            return Plan(
                Gather(selection.top_k_of_parts(scores.view(len(visual), -1), crops, keep + more)),
                positions=self.positions,
            )
        whole = signals.prunable.float().scatter(1, visual, scores)
        counts = [min(budget.count(n) + more, n) for n in signals.available()]
        return Plan(signals.keep(counts, scores=whole), positions=self.positions)
