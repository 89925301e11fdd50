"""ToDRE (Li et al., 2025): first diversity, then relevance. Visual tokens are thinned out before the decoder so that
they are as unlike as can be, and leave it altogether once the text has ceased to look at them.

Unit: a visual token. A reconstruction from the paper and its pseudo-code; no code is public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeFloat, Share
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site, take
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Pivot = Literal["class", "random", "centre", "farthest"]
Rule = Literal["sum", "max"]
CLASS = Reading("cls_row", -1, "encoder")


def max_sum_order(tokens: Tensor, pivot: Tensor, count: int, rule: Rule = "sum", real: Tensor | None = None) -> Tensor:
    """The first `count` tokens [B, count] of tokens [B, N, D] in the order in which they are picked: the pivot [B, 1],
    then, each time, the one that is least like those picked before, by the sum of its cosines to them (algorithm 1), or
    by the largest (`max`, version 1: the k-centre rule). Ties go to the earlier token; where `real` [B, N] is False a
    token comes last."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    cosines = unit @ unit.mT  # of all pairs at once: a row for each pick would read every token again
    alike = unit.new_zeros(unit.shape[:2]) if rule == "sum" else torch.full_like(unit[..., 0], -1.0)
    if real is not None:
        alike = alike.masked_fill(~real, float("inf"))
    picks = [pivot] if count else [pivot[:, :0]]
    for _ in range(count - 1):
        near = take(cosines, picks[-1]).squeeze(1)  # [B, N] to the last pick
        alike = alike + near if rule == "sum" else alike.maximum(near)
        alike = alike.scatter(1, picks[-1], float("inf"))
        picks.append(alike.argmin(-1, keepdim=True))
    return torch.cat(picks, 1)


def from_centre(tokens: Tensor) -> Tensor:
    """Distance [B, N] of each token [B, N, D] to the mean of all."""
    return (tokens.float() - tokens.float().mean(1, keepdim=True)).norm(dim=-1)


def looked_at(attention: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """a_tv [B]: the share of the text's attention [B, H, R, N] that goes to visual tokens [B, N], and whether there is
    text at all. (Its counterpart a_vt, of visual tokens to the text behind them, is zero in a causal decoder.)"""
    total = attention.float().sum((1, 2, 3))
    seen = (attention.float() * visual[:, None, None]).sum((1, 2, 3))
    return seen / total.clamp_min(torch.finfo(torch.float32).tiny), total > 0


@dataclass(frozen=True)
class ToDRE(TokenPruner):
    """ToDRE (arXiv 2505.18757): keeps visual tokens that are unlike each other, starting with the one that the image
    encoder's class token attends to most, and drops all of them late in the decoder where the text ignores them.

    Parameters
    ----------
    pivot : {"class", "random", "centre", "farthest"}
        Where the picks start: the best by class attention in the encoder's last layer (of a large image's thumbnail
        alone), any token, or the one nearest to or farthest from the mean.
    rule : {"sum", "max"}
        Likeness to all picks, or to the nearest one, as in version 1.
    late : tuple of float
        Where in the decoder tokens may leave altogether, as shares of its depth; none: they stay.
    threshold : float
        tau, the share of the text's attention below which they leave.
    positions : str
        Kept tokens are numbered anew, or keep their numbers. What is left late in the decoder always does.
    """

    pivot: Pivot = "class"
    rule: Rule = "sum"
    late: tuple[Share, ...] = (0.875,)
    threshold: NonNegativeFloat = 0.1
    positions: Positions = "renumber"

    name: ClassVar[str] = "todre"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layers = [int(share * info.depth) for share in self.late]
        return [Site(0, "projected"), *(Site(layer, "input") for layer in layers if layer < info.depth)]

    def requires(self, site: Site) -> frozenset[Signal]:
        if site.where == "input":
            return frozenset({Reading("attention", site.layer - 1, rows="text")})
        return frozenset({"hidden", CLASS} if self.pivot == "class" else {"hidden"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if site.where == "input":
            return self.leave(site, signals)
        visual = signals.candidates()  # [B, M]
        real = None if signals.valid is None else signals.prunable.gather(1, visual)
        tokens = take(signals.hidden, visual)
        pivot = self.start(signals, tokens, visual, real)
        order = max_sum_order(tokens, pivot, budget.count(signals.units), self.rule, real)
        return Plan(signals.keep(budget, order=visual.gather(1, order)), positions=self.positions)

    def start(self, signals: TokenSignals, tokens: Tensor, visual: Tensor, real: Tensor | None) -> Tensor:
        """The pivot [B, 1] among tokens [B, M, D], the visual ones [B, M]."""
        if self.pivot == "random":
            weights = torch.ones_like(visual, dtype=torch.float32) if real is None else real.float()
            return torch.multinomial(weights, 1, generator=signals.rng)
        if self.pivot == "class":
            score = signals.at(CLASS).float().mean(1).gather(1, visual)
            if signals.modality == "image":  # a large image's first crop is its thumbnail
                score = score[:, : score.shape[1] // len(signals.grids)]
        else:
            score = from_centre(tokens) if self.pivot == "farthest" else -from_centre(tokens)
        if real is not None:
            score = score.masked_fill(~real[:, : score.shape[1]], float("-inf"))
        return score.argmax(-1, keepdim=True)

    def leave(self, site: Site, signals: TokenSignals) -> Plan:
        """All visual tokens leave a sample whose text looks at them no more; without values they are taken to."""
        if signals.units and signals.prunable.device.type != "meta":
            attention = signals.at(Reading("attention", site.layer - 1, rows="text"))
            share, visible = looked_at(attention, signals.prunable)
            stays = ~(visible & (share < self.threshold))
            return Plan(signals.keep(mask=stays.unsqueeze(1).expand_as(signals.prunable)), positions="original")
        return Plan(signals.keep(Budget(0, "count"), scores=signals.prunable.float()), positions="original")
