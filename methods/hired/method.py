"""HiRED (Arif et al., AAAI 2025): the thumbnail says how many tokens each crop of a large image deserves.

Unit: a patch of the image encoder, before the decoder. The class token's attention in an early layer shares a budget
among the crops, that in a late one chooses within each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, Share
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Positions, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Regions = Literal["rows", "crops"]


def importance(cls_row: Tensor) -> Tensor:
    """The score of every patch [..., N]: the attention [..., H, N] of the class token, summed over heads."""
    return cls_row.sum(-2)


def split(total: int, alpha: float, patches: int, crops: int) -> tuple[int, int]:
    """How many of `total` tokens the thumbnail gets, and how many the other crops together."""
    full = min(int(total * alpha), patches)
    return full, min(total - full, (crops - 1) * patches)


@lru_cache(maxsize=64)
def regions(grid: tuple[int, int], crops: int, mosaic: tuple[int, int] | None, how: Regions) -> Tensor:
    """The crop [N], from 0, that each patch of the thumbnail speaks for: the one that covers it (`crops`), or, as
    released, consecutive runs of patches in raster order, whatever the crops cover (`rows`). Made once for its
    sizes."""
    height, width = grid
    indices = torch.arange(height * width)
    if how == "rows" or mosaic is None:
        return indices * crops // (height * width)
    rows, columns = mosaic
    return indices // width * rows // height * columns + indices % width * columns // width


def crop_budgets(early: Tensor, region: Tensor, crops: int, marked: int, rest: int) -> Tensor:
    """Tokens [B, crops] that each crop gets of `rest`: in proportion to how many of the thumbnail's `marked` best
    patches, by the early scores [B, N], lie in its region; rounded down, and no more than it has."""
    best, _ = selection.top_k(early, marked)
    marks = early.new_zeros(len(early), crops, dtype=torch.float32)
    marks = marks.scatter_add(1, region.to(early.device)[best], torch.ones_like(best, dtype=torch.float32))
    return (marks / marked * rest).long().clamp_max(early.shape[1])


@dataclass(frozen=True)
class HiRED(TokenPruner):
    """HiRED (arXiv 2408.10945): gives the thumbnail and each crop of a large image a number of tokens, and keeps those
    that the encoder's class token attends to most.

    The budget is the share of all patches of all crops (0.2 in the paper), or their number. Rounding leaves a little
    less, and what is kept in the border that unpadding cuts off is lost. A single crop keeps its best; a budget of
    everything keeps everything.

    Parameters
    ----------
    alpha : float
        Share of the budget that the thumbnail gets; so many of its patches speak for no crop.
    early, late : int, int, optional
        Layers of the image encoder whose class attention shares the budget, and chooses; None: the one that gives the
        features.
    regions : {"rows", "crops"}
        What of the thumbnail speaks for a crop: a run of rows, as released, or the part that the crop covers, as
        written.
    newlines : bool
        Whether rows of a large image keep their newline tokens, as its model packs them; released without.
    positions : str
        The kept tokens are numbered anew, as released, or keep their numbers.
    """

    alpha: Share = 0.5
    early: NonNegativeInt = 0
    late: NonNegativeInt | None = None
    regions: Regions = "rows"
    newlines: bool = True
    positions: Positions = "renumber"

    name: ClassVar[str] = "hired"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def readings(self) -> tuple[Reading, Reading]:
        """The early and the late attention."""
        late = -1 if self.late is None else self.late
        return Reading("cls_row", self.early, "tower"), Reading("cls_row", late, "tower")

    def requires(self, site: Site) -> frozenset[Reading]:
        return frozenset(self.readings())

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        late = importance(signals.at(self.readings()[1]))
        if len(signals.grids) > 1 and budget.count(signals.units) < signals.units:
            early = importance(signals.at(self.readings()[0]))
            kept = self.of_crops(early, late, signals, budget.count(signals.units))
        else:
            kept = signals.keep(budget, scores=late)
        # places are values, which the meta device has none of
        nowhere = None if self.newlines else torch.full((*kept.index.shape, 3), -1, device="cpu")
        return Plan(kept, layout=nowhere, positions=self.positions)

    def of_crops(self, early: Tensor, late: Tensor, signals: TokenSignals, total: int) -> Gather:
        """What stays of the patches [B, crops * N] of a thumbnail and its crops, for their scores."""
        crops = len(signals.grids)
        early, late = (scores.unflatten(1, (crops, -1)) for scores in (early, late))
        patches = late.shape[2]
        full, rest = split(total, self.alpha, patches, crops)
        marked = int(patches * (1 - self.alpha))
        if rest and not marked:
            raise PrunelabError(
                f"{self.name}: nothing speaks for the crops with alpha {self.alpha:g}; give a smaller one"
            )
        if late.device.type == "meta":  # what rounding leaves is in the values
            return Gather(torch.arange(full + rest, device=late.device).expand(len(late), -1))
        shares = late.new_zeros(len(late), crops, dtype=torch.long)
        shares[:, 0] = full
        if rest:
            with torch.device("cpu"):
                region = regions(signals.grids[0], crops - 1, signals.mosaic, self.regions)
            shares[:, 1:] = crop_budgets(early[:, 0], region, crops - 1, marked, rest)
        first = torch.arange(patches, device=late.device) < shares.unsqueeze(-1)  # of the order, as many as a crop has
        stays = torch.zeros_like(first).scatter(-1, selection.descending(late), first)
        return signals.keep(mask=stays.flatten(1))
