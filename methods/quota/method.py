"""QuoTA (Luo et al., 2025): a question-dependent share of a fixed token budget for every frame of a video.

Unit: a visual token before packing. A second model says how relevant each frame is to the question
(`measures/frame_scoring.py`); the budget is shared by the sharpened scores, and each frame's feature map is resized to
what it got, up or down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Assigner = Literal["bilinear", "average", "linspace", "merge", "axes"]
SCORES = "frame_scores"

# -- which frames ------------------------------------------------------------------------------------------------------


def frame_count(seconds: float, base: int = 96, alpha: float = 64) -> int:
    """Frames to sample of a video: `base`, and `alpha` more an hour."""
    return base + math.floor(seconds / 3600 * alpha)


def frame_places(frames: int, count: int) -> list[int]:
    """`count` places, evenly over a video of `frames` frames from its first to its last; short videos repeat some."""
    if frames < 1 or count < 1:
        raise PrunelabError(f"cannot sample {count} frames of a video of {frames}; both must be at least 1")
    places: list[int] = np.linspace(0, frames - 1, count).astype(int).tolist()
    return places


# -- how much of the budget each gets ----------------------------------------------------------------------------------


def sharpened(scores: Tensor, exponent: float = 2.0) -> Tensor:
    """Shares [T] of the budget, in float64, for scores [T] in [0, 1]: their powers, of sum 1."""
    weights = (100 * scores.double()) ** exponent
    total = weights.sum()
    if not bool(torch.isfinite(total)) or bool((scores < 0).any()) or float(total) == 0:
        raise PrunelabError("frame scores must be finite, not negative, and not all zero; look at the scorer's answers")
    return weights / total


def capped(shares: Tensor, most: float) -> Tensor:
    """Shares [T] with none above `most`, in the one sequential pass of the released code.

    The excess is handed to frames below the cap in proportion to their shares, first to last; what a frame cannot take
    joins the excess for those behind it. Nothing is normalised, so the sum may end below 1.
    """
    clipped = shares.clamp(max=most).tolist()
    excess, total = float((shares - shares.clamp(max=most)).sum()), sum(clipped)
    for i, share in enumerate(clipped):
        if share < most:
            raised = share + excess * share / total
            excess += max(0.0, raised - most)
            clipped[i] = min(raised, most)
    return torch.tensor(clipped, dtype=torch.float64)


def even(total: int, frames: int) -> list[int]:
    """The same number of tokens for every frame."""
    return [total // frames] * frames


def grid_of(tokens: int) -> tuple[int, int]:
    """Height and width of the nearly square map of at most so many tokens; one row more than columns where it fits."""
    side = math.isqrt(tokens)
    return (side + 1, side) if side * side < tokens and (side + 1) * side <= tokens else (side, side)


# -- the five ways to resize a frame -----------------------------------------------------------------------------------


def merged_axes(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Mix:
    """Merges alike tokens of each row [H * W, D] down to the width, then alike ones of each column to the height."""
    (rows, columns), (height, width) = grid, (min(size[0], grid[0]), min(size[1], grid[1]))
    across = selection.merged(tokens.unflatten(0, grid), width)  # one row a sample
    place = torch.arange(rows, device=tokens.device).unsqueeze(1)
    target, source = (across.target + place * width).view(1, -1), (across.source + place * columns).view(1, -1)
    rowwise = Mix(target, source, across.weight.reshape(1, -1), rows * width)
    narrow = rowwise.apply(tokens.unsqueeze(0)).view(rows, width, -1)
    down = selection.merged(narrow.transpose(0, 1), height)  # one column a sample
    place = torch.arange(width, device=tokens.device)
    target, source = (down.target.T * width + place).reshape(1, -1), (down.source.T * width + place).reshape(1, -1)
    return selection.chained(rowwise, Mix(target, source, down.weight.T.reshape(1, -1), height * width))


def merged_maps(tokens: Tensor, count: int, grid: tuple[int, int]) -> Mix:
    """Halves the maps [T, H * W, D] as the model's pooling does, then merges the alike tokens of each to `count`."""
    pooled = selection.resized(grid, halved(grid), batch=len(tokens), device=tokens.device)
    return selection.merged(pooled.apply(tokens.float()), count, pooled)


def resize(tokens: Tensor | None, count: int, grid: tuple[int, int], how: Assigner, device: torch.device) -> Mix:
    """One frame's map, of `grid` (height, width), brought to at most `count` tokens, batch 1.

    tokens [N, D]: needed to merge alike ones only.
    """
    size = grid_of(count)
    if how in ("bilinear", "average"):
        return selection.resized(grid, size, how, device=device)
    if how == "linspace":
        picks = torch.from_numpy(np.linspace(0, grid[0] * grid[1] - 1, count).astype(int)).to(device).unsqueeze(0)
        return Mix(torch.arange(count, device=device).unsqueeze(0), picks, torch.ones(1, count, device=device), count)
    assert tokens is not None
    if how == "axes":
        return merged_axes(tokens.float(), grid, size)
    return merged_maps(tokens.unsqueeze(0), count, grid)


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """The map's size behind the model's two by two pooling."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def assign(
    tokens: Tensor | None, counts: Sequence[int], grid: tuple[int, int], how: Assigner, device: torch.device
) -> tuple[Mix, Tensor]:
    """Every frame of one video resized to its count, one after the other; frames without a token are gone.

    tokens [T, N, D] or None (see `resize`). The mixture is of the T * N tokens, batch 1; the layout [K, 3] has row and
    column -1 where outputs have no order in space.
    """
    units = grid[0] * grid[1]
    flat = how in ("linspace", "merge")
    known: dict[int, Mix] = {}
    ready: dict[int, Mix] = {}  # by frame, of those that are merged to as many together
    if how == "merge" and tokens is not None:
        for count in {count for count in counts if count > 0}:
            alike = [t for t, other in enumerate(counts) if other == count]
            mix = merged_maps(tokens[alike], count, grid)
            rows = zip(mix.target.split(1), mix.source.split(1), mix.weight.split(1), strict=True)
            ready |= {t: Mix(*row, mix.outputs) for t, row in zip(alike, rows, strict=True)}
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    places: list[Tensor] = [torch.zeros(0, 3, dtype=torch.long)]
    first = 0
    for t, count in enumerate(counts):
        if count <= 0:
            continue
        if t not in ready and (tokens is not None or count not in known):
            known[count] = resize(None if tokens is None else tokens[t], count, grid, how, device)
        mix = ready[t] if t in ready else known[count]
        parts.append((mix.target + first, mix.source + t * units, mix.weight))
        first += mix.outputs
        order = torch.arange(mix.outputs)
        width = mix.outputs if flat else grid_of(count)[1] if how != "axes" else min(grid_of(count)[1], grid[1])
        place = torch.stack([torch.full_like(order, t), order // width, order % width], 1)
        if flat:
            place[:, 1:] = -1  # assumption: a newline then ends each frame, where rows would have one
        places.append(place)
    if not parts:
        none = torch.zeros(1, 0, dtype=torch.long, device=device)
        return Mix(none, none, none.float(), 0), places[0]
    target, source, weight = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return Mix(target, source, weight, first), torch.cat(places)


def stacked(videos: Iterable[tuple[Mix, Tensor]]) -> tuple[Mix, Tensor]:
    """Mixtures and layouts of several videos as one batch, padded to the longest."""
    mixes, layouts = zip(*videos, strict=True)
    outputs, entries = max(m.outputs for m in mixes), max(m.target.shape[1] for m in mixes)

    def wide(parts: Iterable[Tensor], length: int) -> Tensor:  # entries of weight zero change nothing
        return torch.cat([torch.nn.functional.pad(part, (0, length - part.shape[1])) for part in parts])

    target, source, weight = (wide((getattr(m, n) for m in mixes), entries) for n in ("target", "source", "weight"))
    counts = torch.tensor([m.outputs for m in mixes], device=target.device)
    alike = len({m.outputs for m in mixes}) == 1
    valid = None if alike else torch.arange(outputs, device=target.device) < counts.unsqueeze(1)
    laid = torch.stack([torch.nn.functional.pad(p, (0, 0, 0, outputs - len(p)), value=-1) for p in layouts])
    return Mix(target, source, weight, outputs, valid), laid


@dataclass(frozen=True)
class QuoTA(TokenPruner):
    """QuoTA (arXiv 2503.08689): resizes every frame to its share of the budget, a number of tokens for the whole video:
    the paper's 12544.

    Parameters
    ----------
    weighting : {"query", "even"}
        `query` shares by the service `frame_scores`, for each video its frames' scores [T] (`measures/frame_scoring.py`
        makes them), or a function of the numbers of videos and of frames that gives these; `even` gives all frames as
        much, the paper's rows without weighting, and needs no service.
    assigner : {"bilinear", "average", "linspace", "merge", "axes"}
        The paper's interpolation, pooling into bins, picks, merging of alike tokens, or rows, then columns merged. All
        but the first cap a frame at the tokens it has.
    exponent : float
        How much the scores are sharpened.
    """

    weighting: Literal["query", "even"] = "query"
    assigner: Assigner = "bilinear"
    exponent: NonNegativeFloat = 2.0

    name: ClassVar[str] = "quota"
    ascending: ClassVar[bool] = False
    exempt = {
        "budget": "shares and the rows and columns of each frame are rounded down",
        "padding": "frames have one length; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"} if self.assigner in ("merge", "axes") else ())

    def counts(self, total: int, frames: int, most: int, scores: Tensor | None) -> list[int]:
        """Tokens of each frame out of `total`, for the scores [T], or None for even ones; `most` is a frame's size."""
        if scores is None:
            return even(total, frames)
        shares = sharpened(scores, self.exponent)
        if self.assigner != "bilinear" and total:
            shares = capped(shares, most / total)
        return [int(total * share) for share in shares.tolist()]

    def scores(self, signals: TokenSignals, videos: int, frames: int) -> Sequence[Tensor | None]:
        """Of each video of so many frames, in the order of the prompts."""
        if self.weighting == "even":
            return [None] * videos
        if SCORES not in signals.services:
            raise PrunelabError(
                f"quota weighs frames by the service '{SCORES}'; pass services={{'{SCORES}': [scores of each video]}},"
                " or use weighting='even'"
            )
        service = signals.services[SCORES]
        rows = service(videos, frames) if callable(service) else service
        given = [torch.as_tensor(part).detach().cpu() for part in rows]
        fitting = [part for part in given if part.shape == (frames,)]
        if signals.prunable.device.type == "meta":  # costs are counted of one video: the first
            fitting = fitting[:videos]
        if len(fitting) != videos:
            raise PrunelabError(
                f"{videos} videos of {frames} frames came, but '{SCORES}' has {len(fitting)} rows of that length; give"
                " one row of scores a video, one score a frame"
            )
        return fitting

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        batch, total = signals.prunable.shape
        device, special, frames = signals.prunable.device, total - signals.units, max(1, len(signals.grids))
        units = signals.units // frames
        whole = bool(signals.grids) and math.prod(signals.grids[0]) == units
        grid = signals.grids[0] if whole else (1, units)  # what is left of a map is one row
        # assumption: what `merge` has of a frame is what pooling leaves
        most = math.prod(halved(grid)) if self.assigner == "merge" else units
        size = budget.count(signals.units)
        shares = [self.counts(size, frames, most, scores) for scores in self.scores(signals, batch, frames)]
        if self.assigner != "merge" and all(count == units for counts in shares for count in counts):
            return Plan(Gather(torch.arange(total, device=device).expand(batch, -1)), positions="renumber")
        maps = None
        if self.requires(site):
            maps = signals.hidden[:, special:].unflatten(1, (frames, units))
        videos = [
            assign(None if maps is None else maps[b], counts, grid, self.assigner, device)
            for b, counts in enumerate(shares)
        ]
        mix, layout = stacked(videos)
        layout = torch.nn.functional.pad(layout, (0, 0, special, 0), value=-1)
        layout = layout if device.type == "meta" else layout.to(device)  # places are values, which meta has none of
        return Plan(selection.behind(mix, special), layout=layout, positions="renumber")
