"""M3 (Cai et al., ICLR 2025): Matryoshka Multimodal Models read a picture at the scale that a run asks for.

Unit: a visual token of a crop, behind the projector. A coarser scale is the mean of equal squares of a finer one, so
that the sets are nested; a model that was trained on all scales works with each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site, Squares
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def kernel(units: int, scale: int) -> int:
    """The side of the squares that are averaged, for a map of so many units and the number of tokens that is asked for:
    the root of their ratio, rounded down, so that a scale that does not divide the map gives more tokens."""
    return max(1, math.isqrt(units // scale))


@lru_cache(maxsize=32)
def squares(grid: tuple[int, int], side: int, maps: int = 1, first: int = 0) -> tuple[Squares, Tensor]:
    """The means of all whole squares of maps (height, width), in rows, as a mixture of batch 1 behind `first` tokens
    that stay, and the map, row and column [K, 3] of each (-1 of those that stay). Rows and columns behind the last
    whole square are left out (average pooling without padding). A matter of sizes alone, it is made once."""
    rows, columns = grid[0] // side, grid[1] // side
    row, column = torch.arange(rows * side).unsqueeze(1), torch.arange(columns * side)
    target = (row // side * columns + column // side).view(1, -1).expand(maps, -1)
    source = (row * grid[1] + column).view(1, -1).expand(maps, -1)
    of_one = Mix(target, source, torch.full(target.shape, 1 / side**2), rows * columns)
    mix = selection.behind(selection.of_crops(of_one, maps, grid[0] * grid[1]), first)
    place = torch.cartesian_prod(torch.arange(maps), torch.arange(rows), torch.arange(columns))
    place = torch.nn.functional.pad(place, (0, 0, first, 0), value=-1)
    made = (mix.target, mix.source, mix.weight)
    return Squares(*made, mix.outputs, grid=grid, side=side, first=first, made=made), place


@dataclass(frozen=True)
class M3(TokenPruner):
    """M3 (arXiv 2405.17430): pools the visual tokens of every crop to one of a nested family of scales.

    The budget is the scale: how many tokens of a crop go on, 576, 144, 36, 9 or 1 of LLaVA's 576 in the paper
    (`"144count"`), or a share, of which the finest scale within it is taken; one token at least. Nothing looks at the
    picture. Weights that were not trained for it lose more: then this is the paper's training-free average pooling.
    """

    name: ClassVar[str] = "m3"
    exempt = {
        "budget": "a scale is a number of whole squares, and more of them are kept than a scale between two asks for",
        "padding": "a map has no padding; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        batch, total = signals.prunable.shape
        device, special, crops = signals.prunable.device, total - signals.units, max(1, len(signals.grids))
        units = signals.units // crops
        scale = max(1, budget.count(units))
        whole = bool(signals.grids) and math.prod(signals.grids[0]) == units
        grid = signals.grids[0] if whole else (1, units)
        side = kernel(units, scale)
        if budget.unit == "ratio" and side * side * scale < units:  # of shares the paper says nothing
            side += 1
        side = min(side, *grid)
        if side == 1:
            return Plan(Gather(torch.arange(total, device=device).expand(batch, -1)), positions="renumber")
        with torch.device("cpu"):  # costs are counted where values are not known, but these depend on sizes alone
            mix, place = squares(grid, side, crops, special)
        layout = place.expand(batch, -1, -1)
        layout = layout if device.type == "meta" else layout.to(device)
        return Plan(mix.of_batch(batch, device), layout, positions="renumber")
