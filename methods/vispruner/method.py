"""VisPruner (Zhang et al., ICCV 2025): what the class token attends to, and of the rest what is not said twice.

Unit: a feature of the image encoder, before the projector. Neither text nor decoder is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import PositiveInt, Share
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Positions, Site, take
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def importance(cls_row: Tensor) -> Tensor:
    """The score of every patch [B, N]: the attention [B, H, N] of the class token, averaged over heads."""
    return cls_row.mean(1)


def split(tokens: int, ratio: float) -> tuple[int, int]:
    """How many of the tokens are important ones, and how many diverse ones."""
    important = int(tokens * ratio)
    return important, tokens - important


def without_duplicates(tokens: Tensor, keep: int, each: int = 8) -> Tensor:
    """Positions [B, keep] of what rounds leave of tokens [B, M, C], which come in the order of their scores.

    A round compares those at even places with those at odd places by cosine, and drops the `each` at even places that
    are most like any of the others. What is left goes on with the least like at the end, before those at odd places.
    """
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    likeness = unit @ unit.transpose(1, 2)  # once for all rounds
    left = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    while left.shape[1] > keep:
        even, odd = left[:, ::2], left[:, 1::2]
        rows = take(likeness, even)  # [B, E, M]
        most = rows.gather(2, odd.unsqueeze(1).expand(-1, even.shape[1], -1)).amax(2) if odd.shape[1] else rows[..., 0]
        # equal ones as torch's plain sort leaves them, on which the released selection depends
        order = most.argsort(dim=1, descending=True)[:, min(each, left.shape[1] - keep, even.shape[1]) :]
        left = torch.cat([even.gather(1, order), odd], 1)
    return left


def selected(scores: Tensor, tokens: Tensor, keep: int, ratio: float, each: int = 8) -> Tensor:
    """Ascending positions [B, keep] of the important and the diverse ones of tokens [B, N, C] with scores [B, N]."""
    important, diverse = split(keep, ratio)
    order = scores.argsort(dim=1, descending=True)  # equal ones as in the rounds
    rest = order[:, important:]
    if diverse:
        rest = rest.gather(1, without_duplicates(take(tokens, rest), diverse, each))
    return torch.cat([order[:, :important], rest[:, :diverse]], 1).sort(-1).values


@dataclass(frozen=True)
class VisPruner(TokenPruner):
    """VisPruner (arXiv 2412.01818): keeps the patches that the encoder's class token attends to most, and of the others
    those that are left when the most alike are taken away in rounds; of every crop as many.

    A number in the budget is a crop's.

    Parameters
    ----------
    ratio : float
        Share of the budget that is important patches, rounded down; the others are diverse ones.
    each : int
        How many patches go in each round.
    newlines : bool
        Whether rows of a large image keep their newline tokens, as its model packs them; released without.
    positions : str
        The kept tokens are numbered anew, as released, or keep their numbers.
    """

    ratio: Share = 0.5
    each: PositiveInt = 8
    newlines: bool = True
    positions: Positions = "renumber"

    name: ClassVar[str] = "vispruner"
    exempt = {"padding": "an encoder's crops have no padding"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "encoded")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"cls_row", "hidden"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        crops, visual = len(signals.grids), signals.candidates()  # [B, M]
        scores = importance(signals.cls_row).gather(1, visual)
        tokens = take(signals.hidden, visual)
        scores, tokens = (x.unflatten(1, (crops, -1)).flatten(0, 1) for x in (scores, tokens))  # a crop a row
        chosen = selected(scores, tokens, budget.count(scores.shape[1]), self.ratio, self.each)
        if crops > 1:
            start = scores.shape[1] * torch.arange(crops, device=chosen.device).unsqueeze(1)
            kept = Gather((chosen.unflatten(0, (-1, crops)) + start).flatten(1))
        else:
            kept = signals.keep([chosen.shape[1]], order=visual.gather(1, chosen))
        # places are values, which the meta device has none of
        nowhere = None if self.newlines else torch.full((*kept.index.shape, 3), -1, device="cpu")
        return Plan(kept, layout=nowhere, positions=self.positions)
