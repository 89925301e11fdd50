"""PruneVid (Huang et al., Findings of ACL 2025): what stands still in a segment of a video becomes one token over time,
neighbours in feature space become one in space, and the decoder keeps what the question attends to.

Unit: a pooled token of a frame, then a visual token of the decoder's sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import Cosine, NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveShare
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.core.selection import Clustering
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.tokens.video import Outputs, Pooling, chosen, joined, pooled_video

# -- segments of a video -----------------------------------------------------------------------------------------------


def clustered(tokens: Tensor, count: int, neighbours: int, noise: Tensor | None = None) -> Clustering:
    """DPC-KNN of tokens [B, N, D] into `count` clusters, those with the best centres first."""
    distance = selection.scaled_distance(tokens)
    peaks = selection.peak_scores(distance, min(neighbours, tokens.shape[1]), noise)
    return selection.cluster(distance, selection.descending(peaks)[:, :count], ascending=False)


def runs(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(label, first frame, frames) of every stretch of equal labels."""
    results, start = [], 0
    for label, run in groupby(labels):
        length = len(list(run))
        results.append((label, start, length))
        start += length
    return results


def refined(labels: Sequence[int]) -> list[int]:
    """Labels of frames, of which each cluster keeps its longest runs alone, none where these are single frames. Every
    stretch that this frees joins the longer of the runs beside it, the left one of equals, or label 0 without any."""
    result = runs(labels)
    longest: dict[int, int] = {}
    for label, _, length in result:
        longest[label] = max(longest.get(label, 0), length)
    left = [label if length == longest[label] > 1 else -1 for label, _, length in result for _ in range(length)]
    for label, first, length in runs(left):
        if label >= 0:
            continue
        before, after = runs(left[:first]), runs(left[first + length :])
        beside = [run for run in (*before[-1:], *after[:1]) if run[0] >= 0]
        left[first : first + length] = [max(beside, key=lambda run: run[2])[0] if beside else 0] * length
    return left


def segments(frames: Tensor, share: float, neighbours: int, noise: Tensor | None = None) -> list[tuple[int, int]]:
    """(first frame, frames) of the segments of a video whose frames are described by [T, D]: at most a share of them,
    and at least one (assumption)."""
    if frames.device.type == "meta":  # without values no two frames are alike
        return [(frame, 1) for frame in range(len(frames))]
    count = max(1, int(len(frames) * share))
    result = clustered(frames.unsqueeze(0), count, neighbours, noise)
    return [(first, length) for _, first, length in runs(refined(result.slot[0].tolist()))]


# -- merging inside a segment ------------------------------------------------------------------------------------------


def places(tokens: Tensor, similarity: float) -> tuple[Tensor, Tensor]:
    """The static places of a segment [W, N, D], whose tokens are more alike than `similarity` in the mean over all
    pairs of frames, and the dynamic ones, which all of a single frame are."""
    frames = len(tokens)
    if frames == 1:
        every = torch.arange(tokens.shape[1], device=tokens.device)
        return every[:0], every
    unit = nn.functional.normalize(tokens, dim=-1)
    together = unit.sum(0).square().sum(-1)  # [N] the cosines of all pairs, and W of each with itself
    static = (together - frames) / (frames * (frames - 1)) > similarity
    return static.nonzero().squeeze(1), (~static).nonzero().squeeze(1)


def spatial_merge(
    tokens: Tensor, places: Tensor, ratio: float, whole: int, neighbours: int, noise: Tensor | None
) -> Outputs:
    """Tokens [F, S, D] of frames, all at the places [F, S] of the video, in int(S * ratio) clusters each, at least one
    (assumption); of `whole` and fewer all stay."""
    frames, count = places.shape
    if count <= whole:
        return chosen(places.flatten())
    result = clustered(tokens, max(1, int(count * ratio)), neighbours, noise)
    mix, per = result.mix(), result.centres.shape[1]
    behind = per * torch.arange(frames, device=places.device).unsqueeze(1)
    place = places.gather(1, result.centres).flatten()
    return Outputs((mix.target + behind).flatten(), places.gather(1, mix.source).flatten(), mix.weight.flatten(), place)


def over_time(outputs: Outputs, frames: int, cells: int) -> Outputs:
    """The same in the mean over so many frames, of which these are the first's tokens."""
    later = cells * torch.arange(frames, device=outputs.source.device).unsqueeze(1)
    target, weight = outputs.target.repeat(frames), outputs.weight.repeat(frames) / frames
    return Outputs(target, (outputs.source + later).flatten(), weight, outputs.place)


class Segment(NamedTuple):
    """What is left of a segment: static tokens first, then as many dynamic ones of each frame."""

    frames: int
    static: int
    dynamic: int  # of each frame

    def groups(self) -> list[int]:
        """The sizes of what the decoder chooses from by itself: static tokens, and those of each frame."""
        return [self.static] + [self.dynamic] * self.frames


def grouped(left: Sequence[Segment], device: torch.device) -> Tensor:
    """The group [K] of every token that is left."""
    sizes = torch.tensor([size for part in left for size in part.groups()])
    return torch.arange(len(sizes)).repeat_interleave(sizes).to(device)


# -- inside the decoder ------------------------------------------------------------------------------------------------


def cross_attention(rows: Tensor) -> Tensor:
    """Scores [B, N] of visual tokens, for the attention [B, H, R, N] of the text: the largest over heads and words."""
    return rows.amax((1, 2))


def best_of_groups(scores: Tensor, groups: Tensor, ratio: float) -> Tensor:
    """Mask [B, N] of the int(n * ratio) best scores of each group of n, for groups [B, N]; what is in none (-1)
    stays."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))  # group by group, best first
    sorted_groups = groups.gather(1, order).contiguous()
    first = torch.searchsorted(sorted_groups, sorted_groups)
    size = torch.searchsorted(sorted_groups, sorted_groups, right=True) - first
    rank = torch.arange(groups.shape[1], device=groups.device) - first
    stays = rank < (size.double() * ratio).floor()
    return (groups < 0) | torch.zeros_like(stays).scatter(1, order, stays)


@dataclass(frozen=True)
class PruneVid(TokenPruner):
    """PruneVid (arXiv 2412.16117): merges over time and in space before the decoder, and keeps inside it what the
    question attends to.

    A budget has two amounts, the share of tokens that clusters leave and alpha, the share of these that goes on in the
    decoder (`0.5,0.4` as released); a single one is both.

    Parameters
    ----------
    layer : int, optional
        The decoder's layer, from 0, whose attention chooses; None: 10 of 32, brought to the depth.
    inner : bool
        Whether the decoder chooses at all.
    similarity : float
        tau, the mean cosine above which a place stands still.
    segments : float
        Segments a frame, at most.
    whole : int
        So many tokens and fewer are not clustered.
    neighbours : int
        Of the density.
    noise : float
        Range of a uniform draw added to densities, 1e-6 as released; without it the earlier of equal ones comes first.
    pooling : {"bilinear", "average", "none"}
        How the model pools its videos. An image is taken for a video of its crops that is not pooled.
    trims : int, optional
        From this layer on caches keep of the prompt only what the decoder kept; None: all keep what they saw.
    """

    layer: NonNegativeInt | None = None
    inner: bool = True
    similarity: Cosine = 0.8
    segments: PositiveShare = 0.25
    whole: NonNegativeInt = 14
    neighbours: PositiveInt = 7
    noise: NonNegativeFloat = 0.0
    pooling: Pooling = "bilinear"
    trims: NonNegativeInt | None = 0

    name: ClassVar[str] = "prunevid"
    ascending = False
    exempt = {
        "keep_all": "frames are pooled, and what stands still merges, at any budget",
        "budget": "the budget is a share of groups of tokens, and small groups are not clustered",
        "padding": "a frame has no padding; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        behind = min(round(10 * info.depth / 32), info.depth - 2) if self.layer is None else self.layer
        outer = Site(0, "projected")
        return [outer, Site(behind + 1, "input", 1)] if self.inner else [outer]

    def requires(self, site: Site) -> frozenset[Signal]:
        if site.where == "input":
            return frozenset({Reading("attention", site.layer - 1, rows="text")})
        return frozenset({"hidden"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if site.where == "input":
            return self.chosen(site, signals, budget)
        video = pooled_video(signals, self.name, self.pooling, lambda: [signals.hidden.float()])
        frames, cells = video.maps[0].shape[1:3]
        noise = self.noise * torch.rand(frames, cells + 1, generator=signals.rng, device=video.device)
        left = [self.merged(tokens, share(budget, frames * cells), noise) for tokens in video.maps[0]]
        signals.state["segments"] = left[0][1]
        return video.plan([outputs for outputs, _ in left], [grouped(parts, video.device) for _, parts in left])

    def merged(self, tokens: Tensor, ratio: float, noise: Tensor) -> tuple[Outputs, list[Segment]]:
        """What is left of a video of pooled tokens [T, N, D], and of each segment. noise [T, N + 1]: of tokens, and
        last of frames."""
        cells = tokens.shape[1]
        results, left = [], []
        for first, length in segments(tokens.mean(1), self.segments, self.neighbours, noise[:, -1].unsqueeze(0)):
            part, near = tokens[first : first + length], noise[first : first + length, :-1]
            frames = cells * torch.arange(first, first + length, device=tokens.device).unsqueeze(1)
            still, moving = places(part, self.similarity)
            given = ratio, self.whole, self.neighbours
            mean = part[:, still].mean(0, keepdim=True)
            once = spatial_merge(mean, frames[:1] + still, *given, near[:1, still])
            each = spatial_merge(part[:, moving], frames + moving, *given, near[:, moving])
            results += [over_time(once, length, cells), each]
            left.append(Segment(length, len(once.place), len(each.place) // length))
        return joined(results), left

    def chosen(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        """The decoder's choice: of every group the best."""
        (reading,) = self.requires(site)
        assert isinstance(reading, Reading) and signals.groups is not None
        scores = cross_attention(signals.at(reading).float())
        ratio = share(budget, signals.units)
        if scores.device.type == "meta":  # costs are counted of one video, which repeats nothing
            sizes = [size for part in signals.state["segments"] for size in part.groups()]
            gone = sum(size - int(size * ratio) for size in sizes)
            return Plan(signals.keep([signals.units - gone], scores=scores))
        return Plan(signals.keep(mask=best_of_groups(scores, signals.groups, ratio)))


def share(budget: Budget, units: int) -> float:
    """A budget as a share of the units."""
    return budget.amounts[0] if budget.unit == "ratio" else budget.count(units) / units
