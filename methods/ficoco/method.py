"""FiCoCo-V (Han et al., AAAI 2026): in the later layers of the image encoder redundant patches are filtered, correlated
with those that stay, and compressed into them.

Attention is read before its softmax, as the mean over heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def importance(attention: Tensor, special: int, share: float = 0.35) -> Tensor:
    """Scores [B, P] of the patches, low where they are redundant, of attention logits [B, N, N] with the special tokens
    first: the class token's to a patch, by `share`, less what the patch pays the patches in the mean, each as a vector
    of unit length."""
    paid = F.normalize(attention[:, special:, special:].mean(-1), dim=-1)
    if not special:
        return -(1 - share) * paid
    return share * F.normalize(attention[:, 0, special:], dim=-1) - (1 - share) * paid


def penalised(scores: Tensor, places: Tensor, columns: int, window: int = 2, factor: float = 2.0) -> Tensor:
    """Scores [B, P] with the lowest of every square of `window` by `window` places made lower yet, so that what leaves
    comes from everywhere: `factor` times as low where it is negative, and a part of it where it is not. Places [B, P]
    are those of the grid; of patches that left none counts."""
    cell = places // columns // window * -(-columns // window) + places % columns // window
    lowest = scores.new_full((len(scores), int(columns * columns)), float("inf"))  # no fewer cells than that
    lowest = lowest.scatter_reduce(1, cell, scores, "amin")
    lower = torch.where(scores > 0, scores / factor, scores * factor)
    return torch.where(scores == lowest.gather(1, cell), lower, scores)


def correlated(attention: Tensor, gone: Tensor, count: int, barred: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `count` tokens [B, R, count] to which those that go, [B, R], pay most, but for the `barred` [B, N], and their
    shares of what these get."""
    rows = attention.gather(1, gone.unsqueeze(-1).expand(-1, -1, attention.shape[-1]))
    if barred is not None:
        rows = rows.masked_fill(barred.unsqueeze(1), float("-inf"))
    most, targets = rows.topk(count, -1)
    return targets, most.softmax(-1)


def above(tokens: int, quantile: float) -> int:
    """How many of so many numbers lie above their quantile."""
    return max(1, tokens - 1 - math.floor(round(quantile * (tokens - 1), 6)))


def compressed(tokens: int, gone: Tensor, targets: Tensor, shares: Tensor) -> Mix:
    """The tokens that stay, in their order, each as the mean of itself and of what joins it, which counts by its share;
    gone [B, R], with targets and shares [B, R, K]."""
    batch = len(gone)
    stays = torch.ones(batch, tokens, dtype=torch.bool, device=gone.device).scatter(1, gone, False)
    slot = stays.cumsum(1) - 1
    kept = (~stays).int().argsort(dim=1, stable=True)[:, : tokens - gone.shape[1]]
    joined, source = targets.flatten(1), gone.unsqueeze(-1).expand_as(targets).flatten(1)
    weight = torch.cat([torch.ones_like(kept, dtype=shares.dtype), shares.flatten(1)], 1)
    target = torch.cat([slot.gather(1, kept), slot.gather(1, joined)], 1)
    total = weight.new_zeros(batch, kept.shape[1]).scatter_add(1, target, weight)
    return Mix(target, torch.cat([kept, source], 1), weight / total.gather(1, target), kept.shape[1])


@dataclass(frozen=True)
class FiCoCoV(TokenPruner):
    """Filter, correlate and compress between the layers of the image encoder (arXiv 2411.17686).

    A number or share to keep is what is left in the end, and as many patches leave between all layers.

    Parameters
    ----------
    first : int, optional
        The first layer whose attention is read, counted from 0; None: 12 of CLIP's 24, or as deep in others.
    share : float
        What the class token's attention counts, beside 1 - share for what a patch pays the others.
    window : int
        Side of the squares in each of which the most redundant patch is made more so.
    factor : int
        By how much.
    quantile : float
        Of what a patch pays all tokens, above which those lie that it is compressed into.
    """

    first: NonNegativeInt | None = None
    share: Share = 0.35
    window: PositiveInt = 2
    factor: PositiveInt = 2
    quantile: Share = 0.998

    name: ClassVar[str] = "ficoco_v"
    positions = "renumber"
    exempt = {
        "budget": "as many patches leave between all layers, and what stays is met behind the last",
        "padding": "samples of unlike numbers of patches are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        depth = (info.tower or info).depth
        first = depth // 2 + 1 if self.first is None else self.first
        return [Site(layer, "tower") for layer in range(max(1, min(first + 1, depth - 1)), depth)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        tower = signals.info.tower or signals.info
        total = signals.prunable.shape[1]
        special = total - signals.units
        target = signals.state.setdefault("target", budget.count(signals.units))
        removed = math.ceil((signals.units - target) / (tower.depth - site.layer))
        if removed <= 0:
            return Plan(Gather(torch.arange(total, device=signals.keys.device).expand(len(signals.keys), -1)))
        queries, keys = (x.float().transpose(1, 2).flatten(2) for x in (signals.queries, signals.keys))
        attention = queries @ keys.mT * (signals.keys.shape[-1] ** -0.5 / signals.keys.shape[1])
        everywhere = torch.arange(signals.units, device=keys.device).expand(len(keys), -1)
        places = signals.state.get("places", everywhere)
        columns = tower.grid[-1] if tower.grid else signals.units
        scores = penalised(importance(attention, special, self.share), places, columns, self.window, self.factor)
        order = selection.descending(-scores)
        gone = order[:, :removed] + special
        barred = torch.zeros(len(gone), total, dtype=torch.bool, device=gone.device).scatter(1, gone, True)
        barred[:, :special] = True
        count = min(above(total, self.quantile), signals.units - removed)
        mix = compressed(total, gone, *correlated(attention, gone, count, barred))
        signals.state["places"] = places.gather(1, order[:, removed:].sort(-1).values)
        return Plan(mix, positions="renumber")
