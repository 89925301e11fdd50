"""What methods on videos share: frames pooled as the model pools them, and what is kept of the pooled tokens carried
back to the patches that a `projected` site sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prunelab.common.core.plan import Mix, Plan, take
from prunelab.common.tokens.signals import TokenSignals

Pooling = Literal["bilinear", "average", "none"]


def pooled(maps: Tensor, pooling: Pooling) -> Tensor:
    """Maps [T, H, W, C] at half the size, as the models pool their videos: `bilinear` rounds the size up
    (LLaVA-OneVision), `average` drops an odd last row and column (LLaVA-Video)."""
    if pooling == "none":
        return maps
    x = maps.movedim(-1, 1)
    if pooling == "bilinear":
        half = [math.ceil(side / 2) for side in x.shape[2:]]
        return nn.functional.interpolate(x, size=half, mode="bilinear").movedim(1, -1)
    return nn.functional.avg_pool2d(x, 2).movedim(1, -1)


@cache
def footprints(height: int, width: int, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """What pooling mixes: patches [N, F] behind each of the N pooled tokens of a frame, and their weights [N, F]."""
    patches = height * width
    single = torch.eye(patches, device="cpu").view(patches, height, width, 1)
    matrix = pooled(single, pooling).flatten(1).T  # [N, patches]
    weight, patch = matrix.topk(int((matrix > 0).sum(1).max()), dim=1)
    return patch, weight


class Outputs(NamedTuple):
    """Entries of a sparse matrix (see `Mix`) over a video's pooled tokens, counted frame by frame, and the pooled token
    at whose `place` each output stands."""

    target: Tensor  # [E]
    source: Tensor  # [E]
    weight: Tensor  # [E]
    place: Tensor  # [K]


def chosen(place: Tensor) -> Outputs:
    """The pooled tokens at `place` [K] as they are, in that order."""
    entries = torch.arange(len(place), device=place.device)
    return Outputs(entries, place, torch.ones_like(place, dtype=torch.float), place)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """One after the other."""
    starts = accumulate((len(part.place) for part in parts[:-1]), initial=0)
    moved = [part._replace(target=part.target + start) for part, start in zip(parts, starts, strict=True)]
    return Outputs(*map(torch.cat, zip(*moved, strict=True)))


def by_place(outputs: Outputs) -> Outputs:
    """Frame by frame in the order of the grid; a repeated token stands in the first frame of its segment."""
    order = outputs.place.argsort()
    return outputs._replace(target=order.argsort()[outputs.target], place=outputs.place[order])


def through(outputs: Outputs, patch: Tensor, share: Tensor, patches: int) -> Outputs:
    """The same over the patches, `patches` a frame, that the pooled tokens are made of; see `footprints`."""
    frame, cell = outputs.source // len(patch), outputs.source % len(patch)
    source = frame.unsqueeze(1) * patches + patch[cell]  # [E, F]
    target = outputs.target.unsqueeze(1).expand_as(source)
    weight = outputs.weight.unsqueeze(1) * share[cell]
    return outputs._replace(target=target.flatten(), source=source.flatten(), weight=weight.flatten())


def stacked(videos: Sequence[Outputs], visual: Tensor, protected: Tensor) -> Mix:
    """One Mix of a batch of videos over all units: visual [B, N] are the units that the videos count, protected [B, S]
    stay as they are, in front."""
    lengths = torch.tensor([len(video.place) for video in videos], device=visual.device) + protected.shape[1]
    own = torch.arange(protected.shape[1], device=visual.device).expand_as(protected)
    target, source, weight = (pad_sequence(list(c), batch_first=True) for c in list(zip(*videos, strict=True))[:3])
    outputs = protected.shape[1] + max(len(video.place) for video in videos)
    valid = torch.arange(outputs, device=visual.device) < lengths.unsqueeze(1)
    even = len({len(video.place) for video in videos}) == 1
    return Mix(
        torch.cat([own, target + protected.shape[1]], 1),
        torch.cat([protected, visual.gather(1, source)], 1),
        torch.cat([torch.ones_like(own, dtype=weight.dtype), weight], 1),
        outputs,
        None if even else valid,
    )


class Video(NamedTuple):
    """The pooled tokens of a batch of videos; see `pooled_video`."""

    maps: list[Tensor]  # each [B, T, N, C]
    side: int  # tokens in a row
    device: torch.device
    plan: Callable[..., Plan]  # from what is left of each video, and the groups [K] of each (see `Plan`), if any


def pooled_video(signals: TokenSignals, method: str, pooling: Pooling, read: Callable[[], Sequence[Tensor]]) -> Video:
    """The videos that a `projected` site sees, all of one length, at the size that the model pools them to.

    read gives maps [B, units, C] of the site's units; those of an image, a video of its crops, are not pooled. Raises
    PrunelabError, which names the method, for padded samples.
    """
    signals.one_length(method)
    units, (height, frames) = signals.units, (signals.grids[0][0], len(signals.grids))
    order = signals.prunable.int().argsort(dim=1, descending=True, stable=True)
    visual, protected = order[:, :units], order[:, units:]
    width = units // frames // height
    how: Pooling = "none" if signals.modality == "image" else pooling
    seen = list(read())
    seen = seen if protected.shape[1] == 0 else [take(x, visual) for x in seen]  # spares a copy of a video
    maps = [pooled(x.reshape(-1, height, width, x.shape[2]), how) for x in seen]
    (rows, side), batch = maps[0].shape[1:3], len(visual)
    cells = rows * side
    maps = [x.reshape(batch, frames, cells, -1) for x in maps]

    def plan(left: Sequence[Outputs], groups: Sequence[Tensor] | None = None) -> Plan:
        patch, share = (t.to(visual.device) for t in footprints(height, width, how))
        reduce = stacked([through(m, patch, share, height * width) for m in left], visual, protected)
        behind = (protected.shape[1], 0)
        known = (
            None
            if groups is None
            else nn.functional.pad(pad_sequence(list(groups), batch_first=True, padding_value=-1), behind, value=-1)
        )
        if visual.device.type == "meta":
            return Plan(reduce, positions="renumber", groups=known)
        place = pad_sequence([m.place for m in left], batch_first=True)
        layout = torch.stack([place // cells, place % cells // side, place % side], -1)
        layout = nn.functional.pad(layout, (0, 0, *behind), value=-1)
        return Plan(reduce, layout, positions="renumber", groups=known)

    return Video(maps, side, visual.device, plan)
