"""HoliTom (Shao et al., NeurIPS 2025): tokens of a video are merged over time, then in space, then inside the decoder.

Unit: a patch of a frame. Frames are cut into segments within which as many tokens as possible repeat; repeated tokens
become one a segment and are clustered, the others are ranked frame by frame by the attention they receive in the image
encoder. Optionally the decoder merges what is left once more, before one of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import Cosine, NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site, take
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.holitom.segmentation import Segment, frame_similarity, run_lengths, segment, split

Pooling = Literal["bilinear", "average", "none"]

# -- pooling -----------------------------------------------------------------------------------------------------------


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


# -- what is left of a video -------------------------------------------------------------------------------------------


def effective_ratio(ratio: float, tokens: int, saved: int) -> float:
    """The share to keep of what temporal merging leaves, so that `ratio` of all tokens stays."""
    return min(ratio * tokens / (tokens - saved), 1.0)


def kept_count(units: int, ratio: float) -> int:
    """Units that a frame keeps of those that change: rounded up."""
    return math.ceil(round(units * ratio, 6))


class Outputs(NamedTuple):
    """Entries of a sparse matrix (see `Mix`) over a video's pooled tokens, counted frame by frame, and the pooled token
    at whose `place` each output stands."""

    target: Tensor  # [E]
    source: Tensor  # [E]
    weight: Tensor  # [E]
    place: Tensor  # [K]


def static_tokens(
    tokens: Tensor, static: Tensor, part: Segment, clusters: int, neighbours: int, share: float | None, noise: Tensor
) -> Outputs:
    """Repeated tokens at the places `static` [S] of tokens [T, N, D]: their means over the segment in `clusters`
    clusters. noise [T, N] is added to densities; `share` is the centre's part of a cluster's token, None its mean."""
    first, last = part
    length, per = last - first + 1, tokens.shape[1]
    means = tokens[first : last + 1, static].mean(0, keepdim=True)  # [1, S, D]
    distance = selection.scaled_distance(means)
    centres = selection.density_peaks(distance, clusters, neighbours, noise[first, static].unsqueeze(0))
    found = selection.cluster(distance, centres)
    merged = found.mix(share)
    frames = torch.arange(first, last + 1, device=tokens.device).unsqueeze(1)
    return Outputs(
        merged.target[0].repeat(length),
        (frames * per + static).flatten(),
        merged.weight[0].repeat(length) / length,
        first * per + static[found.centres[0]],
    )


def dynamic_tokens(attention: Tensor, dynamic: Tensor, part: Segment, keep: int) -> Outputs:
    """The `keep` tokens of each frame, among the places `dynamic` [S], that receive most attention [T, N]."""
    first, last = part
    index, _ = selection.top_k(attention[first : last + 1, dynamic], keep)  # [L, keep]
    frames = torch.arange(first, last + 1, device=attention.device).unsqueeze(1)
    place = (frames * attention.shape[1] + dynamic[index]).flatten()
    return Outputs(
        torch.arange(len(place), device=place.device), place, torch.ones_like(place, dtype=torch.float), place
    )


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


# -- inside the decoder ------------------------------------------------------------------------------------------------


def absorbed(tokens: Tensor, kept: Gather, merged: Tensor, running: bool) -> Tensor:
    """Kept tokens [B, K, D] after every token where `merged` [B, N] holds has gone into the most similar kept one for
    which it holds too.

    tokens [B, N, D]; similarity is taken once, before anything changes. running: as released, each in turn becomes half
    of what is there, so that the last one weighs most; otherwise the mean, as the paper says.
    """
    outputs = kept.outputs
    hosts = merged.gather(1, kept.index) if kept.valid is None else merged.gather(1, kept.index) & kept.valid
    seated = torch.zeros(len(merged), merged.shape[1] + 1, dtype=torch.bool, device=merged.device)
    seats = kept.index if kept.valid is None else kept.index.masked_fill(~kept.valid, merged.shape[1])
    gone = merged & ~seated.scatter(1, seats, True)[:, :-1]
    most = merged.shape[1] - outputs if kept.valid is None else int(gone.sum(1).max())
    source = (~gone).int().argsort(dim=1, stable=True)[:, :most]  # [B, G], ascending, padded with others
    real = gone.gather(1, source) & hosts.any(1, keepdim=True)
    unit = nn.functional.normalize(tokens.float(), dim=-1)
    similarity = take(unit, source) @ take(unit, kept.index).transpose(1, 2)  # [B, G, K]
    slot = similarity.masked_fill(~hosts.unsqueeze(1), float("-inf")).argmax(-1)
    guests = torch.zeros(kept.index.shape, device=tokens.device).scatter_add(1, slot, real.float())
    if running:
        together = (slot.unsqueeze(1) == slot.unsqueeze(2)) & real.unsqueeze(1)
        later = together.triu(1).sum(-1)  # [B, G] guests of the same host that come after
        own, weight = 0.5**guests, 0.5 ** (later + 1.0)
    else:
        own = 1 / (guests + 1)
        weight = own.gather(1, slot)
    target = torch.arange(outputs, device=tokens.device).expand_as(kept.index)
    target, source = torch.cat([target, slot], 1), torch.cat([kept.index, source], 1)
    return Mix(target, source, torch.cat([own, weight * real], 1), outputs).apply(tokens)


@dataclass(frozen=True)
class HoliTom(TokenPruner):
    """HoliTom (arXiv 2505.21334): merges the tokens of a video before the decoder and, where `layer` is given, once
    more inside it.

    With a layer a budget has two amounts: the share of all tokens that enters the decoder, and the share of visual
    tokens that goes on from the layer (the paper's 25 % is `0.25,0.5`).

    Parameters
    ----------
    layer : int, optional
        K, the first decoder layer (from 0) that sees tokens merged by the attention of layer K - 1; None leaves it.
    similarity : float
        tau, the cosine above which a token repeats; the paper takes 0.65 at a ratio of 0.1.
    pooling : {"bilinear", "average", "none"}
        How the model pools its videos. An image is taken for a video of its crops that is not pooled; the released code
        prunes videos alone.
    order : {"segment", "grid"}
        Outputs of a segment one after the other, repeated ones first (LLaVA-OneVision), or by grid place, for models
        with newline tokens behind rows (LLaVA-Video).
    centre_share : float, optional
        The centre's part in the token of a cluster; None takes the mean of all.
    inner : {"running", "mean"}
        How merged tokens add up inside the decoder, as released (`running`) or as the paper has it (`mean`).
    neighbours : int
        Of DPC-KNN.
    noise : float
        Range of a uniform draw added to densities, 1e-6 as released; without it the earlier of equal tokens comes
        first, and a video always gives the same tokens.
    window : int
        Frames a segment may have.
    """

    layer: NonNegativeInt | None = None
    similarity: Cosine = 0.8
    pooling: Pooling = "bilinear"
    order: Literal["segment", "grid"] = "segment"
    centre_share: Share | None = 0.6
    inner: Literal["running", "mean"] = "running"
    neighbours: PositiveInt = 7
    noise: NonNegativeFloat = 0.0
    window: PositiveInt = 1024

    name: ClassVar[str] = "holitom"
    exempt = {
        "keep_all": "frames are pooled, and repeated tokens merge, at any budget",
        "budget": "the budget is a share of the pooled tokens, rounded up in every frame",
        "padding": "a frame has no padding; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        outer = Site(0, "projected")
        return [outer] if self.layer is None else [outer, Site(self.layer, "input", 1)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden", "received" if site.where == "projected" else "last_row"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if site.where == "input":  # RoPE goes on with the original positions of those that stay
            return Plan(signals.keep(budget, scores=signals.last_row.mean(1)))
        signals.one_length(self.name)  # from here on before packing
        units, (height, frames) = signals.units, (signals.grids[0][0], len(signals.grids))
        order = signals.prunable.int().argsort(dim=1, descending=True, stable=True)
        visual, protected = order[:, :units], order[:, units:]
        width = units // frames // height
        seen: tuple[Tensor, ...] = (signals.hidden.float(), signals.received.float().mean(1).unsqueeze(-1))
        seen = seen if protected.shape[1] == 0 else tuple(take(x, visual) for x in seen)  # spares a copy of a video
        pooling: Pooling = "none" if signals.modality == "image" else self.pooling
        tokens, attention = (pooled(x.reshape(-1, height, width, x.shape[2]), pooling) for x in seen)
        cells, side = attention[0].numel(), attention.shape[2]
        tokens = tokens.reshape(len(visual), frames, cells, -1)
        attention = attention.reshape(len(visual), frames, cells)
        ratio = budget.amounts[0] if budget.unit == "ratio" else budget.count(frames * cells) / (frames * cells)
        noise = self.noise * torch.rand(frames, cells, generator=signals.rng, device=visual.device)  # one for the batch
        patch, share = (t.to(visual.device) for t in footprints(height, width, pooling))
        merged = [self.merged(x, a, ratio, noise) for x, a in zip(tokens, attention, strict=True)]
        reduce = stacked([through(m, patch, share, height * width) for m in merged], visual, protected)
        if visual.device.type == "meta":
            return Plan(reduce, positions="renumber")
        place = pad_sequence([m.place for m in merged], batch_first=True)
        layout = torch.stack([place // cells, place % cells // side, place % side], -1)
        return Plan(reduce, nn.functional.pad(layout, (0, 0, protected.shape[1], 0), value=-1), positions="renumber")

    def refine(self, site: Site, hidden: Tensor, signals: TokenSignals, plan: Plan) -> Tensor:
        if site.where != "input":
            return hidden
        assert isinstance(plan.reduce, Gather)  # a Mix would stand at its heaviest token, not at the one kept
        return absorbed(signals.hidden, plan.reduce, signals.prunable, self.inner == "running")

    def merged(self, tokens: Tensor, attention: Tensor, ratio: float, noise: Tensor) -> Outputs:
        """What is left of a video of pooled tokens [T, N, D] that receive the attention [T, N]."""
        frames, cells, _ = tokens.shape
        runs = run_lengths(frame_similarity(tokens) > self.similarity)
        if tokens.device.type == "meta":  # without values a video repeats nothing, as the paper's costs have it
            parts, saved = [(frame, frame) for frame in range(frames)], 0
        else:
            parts, saved = segment(runs, self.window)
        ratio = effective_ratio(ratio, frames * cells, saved)
        found = []
        for part in parts:
            static, dynamic = split(runs, part)
            clusters, keep = round(round(len(static) * ratio, 6)), kept_count(len(dynamic), ratio)
            if frames > 1 and not clusters and not keep:
                raise PrunelabError(
                    f"{self.name}: the budget keeps no token of the frames {part[0]} to {part[1]}; give a larger one"
                )
            if clusters:
                found.append(static_tokens(tokens, static, part, clusters, self.neighbours, self.centre_share, noise))
            found.append(dynamic_tokens(attention, dynamic, part, keep))
        outputs = joined(found)
        return by_place(outputs) if self.order == "grid" else outputs
