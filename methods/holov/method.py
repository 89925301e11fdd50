"""HoloV (Zou et al., NeurIPS 2025): attention peaks crowd together, so every part of a picture gets a share of what is
kept.

Unit: a visual token before the decoder. The tokens of a picture, in raster order, are cut into parts ("crops" in the
paper); a part's share follows from its attention and from how much its tokens differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt
from prunelab.common.core.plan import Mix, ModelInfo, Plan, Positions, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Overflow = Literal["zero", "drop", "share"]


def parts_of(total: int, keep: int, parts: int) -> list[tuple[int, int]]:
    """Runs (parts, tokens of each) that cut `total` tokens: as many parts as are asked for, or, of 0, as the paper
    takes for so many to keep (1024 / keep of 576); the first ones have a token more."""
    parts = min(parts or max(1, int(1024 / 576 * total / max(keep, 1))), total)
    size, longer = divmod(total, parts)
    return [(count, tokens) for count, tokens in ((longer, size + 1), (parts - longer, size)) if count]


def holistic_score(
    tokens: Tensor, attention: Tensor, diversity: float = 0.09, scale: float = 1000.0, epsilon: float = 1e-6
) -> Tensor:
    """Scores [B, P, M] of the tokens [B, P, M, D] of parts: their attention [B, P, M], scaled, and how unevenly alike
    the others of the part are, weighed so that both are as large in the mean."""
    size = tokens.shape[2]
    if size == 1:  # nothing to differ from; the attention is not scaled, as released
        return attention
    units = (part / (part.norm(dim=-1, keepdim=True) + epsilon) for part in tokens.unbind(1))
    alike = torch.stack([unit @ unit.mT for unit in units], 1)  # part by part, each of which a cache holds
    alike = alike * (1 - torch.eye(size, dtype=alike.dtype, device=alike.device))
    mean = alike.sum(-1, keepdim=True) / (size - 1)
    variance = (alike - mean).square().sum(-1) / (size - 1)  # the zero of the diagonal counts, as released
    scaled = scale * attention
    gamma = scaled.abs().mean(-1, keepdim=True) / (variance.abs().mean(-1, keepdim=True) + epsilon)
    return scaled + diversity * gamma * variance


def quotas(weights: Tensor, keep: Tensor) -> Tensor:
    """How many of `keep` [B, 1] tokens each part gets, [B, P], by weights that add up to 1: rounded down, and what is
    left one each to the heaviest."""
    result = (weights * keep).floor().long()
    rank = selection.descending(weights).argsort(-1)
    return result + (rank < keep - result.sum(-1, keepdim=True)).long()


def share_overflow(quota: Tensor, weights: Tensor, sizes: Tensor, keep: int, epsilon: float = 1e-6) -> Tensor:
    """The paper's redistribution: what is beyond the sizes [P] of parts goes to others, by their weight and room; what
    `keep` lacks after as many rounds as there are parts fills the heaviest ones."""
    for _ in range(len(sizes)):
        over, room = (quota - sizes).clamp_min(0).sum(-1, keepdim=True), (sizes - quota).clamp_min(0)
        share = weights * room
        quota = quota.minimum(sizes) + quotas(share / (share.sum(-1, keepdim=True) + epsilon), over)
    quota = quota.minimum(sizes)
    lacking = keep - quota.sum(-1, keepdim=True)
    order = selection.descending(weights)
    room = (sizes - quota).gather(1, order)
    more = (lacking - room.cumsum(-1) + room).clamp_min(0).minimum(room)
    return quota.scatter_add(1, order, more)


def slots(order: Sequence[Tensor], quota: Tensor, keep: int) -> Tensor:
    """The token [B, K] of each output, -1 for none: part by part, its best first, or in their order where a whole part
    stays. order: of each run of parts, the tokens' ranks [B, P, M]; quota [B, P]."""
    sizes = [ranks.shape[2] for ranks in order for _ in range(ranks.shape[1])]
    stay = quota.minimum(torch.tensor(sizes, device=quota.device))
    first = stay.cumsum(-1) - stay
    places, start = [], 0
    for ranks in order:
        part = slice(start, start + ranks.shape[1])
        own, before = stay[:, part].unsqueeze(-1), first[:, part].unsqueeze(-1)
        natural = torch.arange(ranks.shape[2], device=ranks.device)
        turn = torch.where(own == ranks.shape[2], natural, ranks)
        places.append((before + turn).masked_fill(turn >= own, keep).flatten(1))
        start = part.stop
    place = torch.cat(places, 1).clamp_max(keep)  # what does not stay, or comes too late, is written beside
    number = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return place.new_full((len(place), keep + 1), -1).scatter(1, place, number)[:, :keep]


@dataclass(frozen=True)
class HoloV(TokenPruner):
    """HoloV (arXiv 2510.02912): gives every part of a picture a number of tokens by its attention and its diversity,
    and keeps the best of each.

    Parameters
    ----------
    crops : int
        Into how many parts a picture's tokens are cut; 0 is the paper's rule, 1024 / keep of 576 tokens (the released
        script of LLaVA has 16, with 64 to keep).
    diversity : float
        Weight of the second term; 1 in the paper.
    scale : float
        Of attention beside it.
    power : float
        The paper's tau, to which the parts' scores are raised before they become shares.
    choose : {"attention", "score"}
        What the best of a part are by: their attention, as released, or the score, as written.
    overflow : {"zero", "drop", "share"}
        What a share beyond a part's tokens becomes: zero vectors, as released; nothing; or tokens of others, as
        written.
    attention : {"cls_row", "received"}
        Whose attention: the class token's, or, where there is none (Qwen2.5-VL), that of all tokens.
    epsilon : float
        Added to what is divided by.
    positions : str
        The tokens are numbered anew, as released for LLaVA, or keep their numbers (not with zeros).
    """

    crops: NonNegativeInt = 0
    diversity: NonNegativeFloat = 0.09
    scale: NonNegativeFloat = 1000.0
    power: NonNegativeFloat = 1.0
    choose: Literal["attention", "score"] = "attention"
    overflow: Overflow = "zero"
    attention: Literal["cls_row", "received"] = "cls_row"
    epsilon: NonNegativeFloat = 1e-6
    positions: Positions = "renumber"

    name: ClassVar[str] = "holov"
    exempt = {
        "keep_all": "a part's share may be more than its tokens, which leaves others short",
        "padding": "a picture is cut into parts by its own length",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden", self.attention})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        first, keep = signals.prunable.shape[1] - signals.units, budget.count(signals.units)
        tokens = signals.hidden[:, first:].float()
        attention = getattr(signals, self.attention).float().mean(1)[:, first:]
        slot = self.slots(tokens, attention, keep)
        if self.overflow == "zero":
            source, target = slot.clamp_min(0), torch.arange(keep, device=slot.device).expand_as(slot)
            mix = selection.behind(Mix(target, source, (slot >= 0).float(), keep), first)
            return Plan(mix, layout=torch.full((len(slot), mix.outputs, 3), -1, device="cpu"), positions=self.positions)
        spare = signals.prunable.new_zeros(len(slot), first + tokens.shape[1] + 1)  # the last is written for none
        mask = spare.scatter(1, torch.where(slot < 0, spare.shape[1] - 1, slot + first), True)[:, :-1]
        kept = signals.keep(budget, mask=mask) if self.overflow == "share" else signals.keep(mask=mask)
        return Plan(kept, positions=self.positions)

    def slots(self, tokens: Tensor, attention: Tensor, keep: int) -> Tensor:
        """The token [B, K] of each output, -1 for none, for tokens [B, N, D] and the attention [B, N] to them."""
        scores, ranks, sizes, start = [], [], [], 0
        for parts, size in parts_of(tokens.shape[1], keep, self.crops):
            part = slice(start, start + parts * size)
            own = attention[:, part].unflatten(1, (parts, size))
            score = holistic_score(
                tokens[:, part].unflatten(1, (parts, size)), own, self.diversity, self.scale, self.epsilon
            )
            best = own if self.choose == "attention" else score
            ranks.append(selection.descending(best).argsort(-1))
            scores.append(score.mean(-1))
            sizes += [size] * parts
            start = part.stop
        total = torch.cat(scores, 1) ** self.power
        weights = total / (total.sum(-1, keepdim=True) + self.epsilon)
        quota = quotas(weights, torch.full_like(weights[:, :1], keep))
        if self.overflow == "share":
            quota = share_overflow(quota, weights, torch.tensor(sizes, device=quota.device), keep, self.epsilon)
        return slots(ranks, quota, keep)
