"""Average-pooled tokens: the content-blind baseline that throws nothing away, only detail.

Unit: a visual token before packing. Every image or video keeps exactly its budget: frames (or crops) share it evenly,
and each frame's map is averaged over as many regions, in rows, as it got.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def shares(total: int, parts: int) -> list[int]:
    """`total` over `parts` as evenly as whole numbers can, the larger ones spread among the others."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def spans(length: Tensor | int, first: Tensor, parts: Tensor | int, size: int) -> Tensor:
    """Masks [R, size] of the cells of each region: the `first`-th of so many equal parts of an axis, grown outwards to
    whole cells, so that neighbours may overlap in one. All but `size` broadcast to [R]."""
    cell = torch.arange(size)
    start, end = first * length // parts, -(-(first + 1) * length // parts)
    return (cell >= start.unsqueeze(1)) & (cell < end.unsqueeze(1))


def regions(count: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weights [count, H * W] that average a map of `grid` (height, width) over `count` regions, and the row and column
    [count, 2] of each. Regions are about square; where the count is no product, some rows have one region more."""
    height, width = grid
    rows = min(height, count, max(round(math.sqrt(count * height / width)), math.ceil(count / width), 1))
    columns = torch.tensor(shares(count, rows))  # regions of each row
    row = torch.repeat_interleave(torch.arange(rows), columns)
    column = torch.arange(count) - (columns.cumsum(0) - columns)[row]
    inside = (
        spans(height, row, rows, height).unsqueeze(2) & spans(width, column, columns[row], width).unsqueeze(1)
    ).flatten(1)
    return inside / inside.sum(1, keepdim=True), torch.stack([row, column], 1)


def pooled(count: int, frames: int, grid: tuple[int, int]) -> tuple[Mix, Tensor]:
    """A video of `frames` maps of `grid`, one after the other, pooled to `count` tokens as a mixture, batch 1, and the
    frame, row and column [count, 3] of each."""
    units = grid[0] * grid[1]
    target, source, weight, layout = [], [], [], [torch.zeros(0, 3, dtype=torch.long)]
    made = {n: regions(n, grid) for n in set(shares(count, frames)) if n}
    first = 0
    for frame, share in enumerate(shares(count, frames)):
        if not share:
            continue
        weights, place = made[share]
        output, cell = weights.nonzero(as_tuple=True)
        target.append(output + first)
        source.append(cell + frame * units)
        weight.append(weights[output, cell])
        layout.append(torch.cat([torch.full((share, 1), frame), place], 1))
        first += share
    empty = [torch.zeros(0)]
    parts = [torch.cat(part or empty).unsqueeze(0) for part in (target, source, weight)]
    return Mix(parts[0].long(), parts[1].long(), parts[2], count), torch.cat(layout)


@dataclass(frozen=True)
class PooledTokens(TokenPruner):
    """A baseline: averages the map of every image, crop or frame over regions, to the budget.

    A ratio counts from the tokens that the model would read, so that of a video that it pools itself 0.5 is half of
    what is left behind that. Frames that get no token are gone.
    """

    name: ClassVar[str] = "pooled_tokens"
    exempt = {"padding": "a map has no padding; padded samples are refused"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        batch, total = signals.prunable.shape
        device, special, frames = signals.prunable.device, total - signals.units, max(1, len(signals.grids))
        count = budget.count(signals.packed)
        if count == signals.units:
            return Plan(Gather(torch.arange(total, device=device).expand(batch, -1)), positions="renumber")
        units = signals.units // frames
        whole = bool(signals.grids) and math.prod(signals.grids[0]) == units
        with torch.device("cpu"):  # costs are counted where values are not known, but these depend on sizes alone
            mix, layout = pooled(count, frames, signals.grids[0] if whole else (1, units))
            mix = selection.behind(mix, special)
            layout = torch.nn.functional.pad(layout, (0, 0, special, 0), value=-1).expand(batch, -1, -1)
        target, source, weight = (part.expand(batch, -1).to(device) for part in (mix.target, mix.source, mix.weight))
        layout = layout if device.type == "meta" else layout.to(device)
        return Plan(Mix(target, source, weight, mix.outputs), layout, positions="renumber")
