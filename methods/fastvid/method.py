"""FastVID (Shen et al., NeurIPS 2025): a video in segments; salient tokens stay, others gather at peaks of density.

Unit: a pooled token of a frame. The three released versions, for three models, are settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import Cosine, NonNegativeFloat, PositiveInt, Share
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.tokens.video import Outputs, Pooling, by_place, chosen, joined, pooled_video

Segment = tuple[int, int]  # first and last frame, both inside
HEAD = "pooling_head"


def pooling_head(
    features: Tensor, weights: Mapping[str, Tensor], heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """SigLIP's attention pooling of features [T, N, D] behind its last norm: a descriptor [T, D] of each frame, and the
    probe's attention [T, N], mean over heads."""
    probe = weights["probe"].expand(len(features), -1, -1).transpose(0, 1)
    keys = features.transpose(0, 1)
    pooled, attention = nn.functional.multi_head_attention_forward(
        probe, keys, keys, features.shape[2], heads,
        weights["attention_in_proj_weight"], weights["attention_in_proj_bias"], None, None, False, 0.0,
        weights["attention_out_proj_weight"], weights["attention_out_proj_bias"], training=False,
    )  # fmt: skip
    pooled = pooled[0]
    norm = nn.functional.layer_norm(
        pooled, pooled.shape[-1:], weights["layernorm_weight"], weights["layernorm_bias"], eps
    )
    inner = nn.functional.gelu(
        nn.functional.linear(norm, weights["mlp_0_weight"], weights["mlp_0_bias"]), approximate="tanh"
    )
    assert attention is not None
    return pooled + nn.functional.linear(inner, weights["mlp_2_weight"], weights["mlp_2_bias"]), attention[:, 0]


def likeness(descriptors: Tensor) -> Tensor:
    """Cosine [T - 1] of each frame's descriptor [T, D] with the next frame's."""
    return nn.functional.cosine_similarity(descriptors[:-1], descriptors[1:], dim=-1)


def segments(similarity: Tensor, count: int, threshold: float) -> list[Segment]:
    """DySeg: frames are parted where the similarity [T - 1] is among the count - 1 lowest, and wherever it is below the
    threshold."""
    if similarity.device.type == "meta":  # without values no two frames are alike
        return [(frame, frame) for frame in range(len(similarity) + 1)]
    lowest = similarity.argsort(stable=True)[: count - 1].tolist()
    ends = [*sorted({*lowest, *(similarity < threshold).nonzero().flatten().tolist()}), len(similarity)]
    return list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))


def spread(total: int, parts: int) -> list[int]:
    """A total in parts as even as can be, the first ones larger."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def gathered(unit: Tensor, anchors: Tensor, pool: Tensor, span: slice, least: float) -> Outputs:
    """Tokens at `anchors` [A], each mixed with the mean of those of the `pool` [P], all within a span of the video,
    that are most like it by the tokens' unit vectors [N, D]: its own weight is 1 / (their number + 1), and at least
    `least`."""
    likeness_of_span = unit[span] @ unit[anchors].T  # the few tokens beside the pool cost less than a copy of it
    slot = likeness_of_span[pool - span.start].argmax(1)
    count = torch.zeros(len(anchors), device=unit.device).scatter_add(0, slot, torch.ones_like(slot, dtype=torch.float))
    own = torch.where(count > 0, (1 / (count + 1)).clamp_min(least), 1.0)
    target = torch.arange(len(anchors), device=unit.device)
    others = ((1 - own) / count.clamp_min(1))[slot]
    return Outputs(torch.cat([target, slot]), torch.cat([anchors, pool]), torch.cat([own, others]), anchors)


class Kept(NamedTuple):
    """How many tokens of a frame stay as they are, and how many gather others."""

    salient: int
    context: int


def by_frame(part: Segment, per: int, share: float, period: int) -> dict[int, Kept]:
    """LLaVA-OneVision: each frame keeps its own salient tokens; the context of the segment stands in every `period`-th
    frame from the last back, what does not divide is lost."""
    first, last = part
    n, context = last - first + 1, int(per * share)
    anchors = range(last, first - 1, -period)
    each = context * n // len(anchors)
    return {frame: Kept(per - context, each if frame in anchors else 0) for frame in range(first, last + 1)}


def by_segment(
    frames: Sequence[int], total: int, share: float, period: int, least: int = 0, cells: int | None = None
) -> dict[int, Kept]:
    """LLaVA-Video: a segment has one budget of `total` tokens for its frames. What does not divide goes to its first
    frames, of context tokens to its last. For Qwen2.5-VL at least `least` of those; at most half of the `cells` of a
    frame are context, and its salient tokens have what that leaves."""
    context = max(int(total * share), least)
    anchors = frames[::-1][::period]
    contexts = dict(zip(anchors, spread(context, len(anchors)), strict=True))
    kept = {}
    for frame, salient in zip(frames, spread(total - context, len(frames)), strict=True):
        most = total if cells is None else cells
        gathers = min(contexts.get(frame, 0), most if cells is None else cells // 2)
        kept[frame] = Kept(min(salient, most - gathers if cells else most), gathers)
    return kept


def last_of_groups(similarity: Tensor, part: Segment, ignore: float) -> list[int]:
    """Qwen2.5-VL: of frames of a segment that are one after the other more alike than `ignore` only the last."""
    first, last = part
    alike = (similarity[first:last] > ignore).tolist()
    return [f for f, same in zip(range(first, last), alike, strict=True) if not same] + [last]


def left(
    tokens: Tensor,
    scores: Tensor,
    parts: Sequence[tuple[Segment, dict[int, Kept]]],
    whole: int,
    least: float,
    neighbours: int,
    noise: Tensor,
    rule: str,
) -> Outputs:
    """What is left of a video [T, N, D] whose tokens have the scores [T, N], by place; noise [T, N].

    whole: in rule "frame", so many context tokens gather the tokens of their own frame alone.
    """
    _, cells, _ = tokens.shape
    unit, results = (
        nn.functional.normalize(tokens, dim=-1).flatten(0, 1),
        [chosen(torch.zeros(0, dtype=torch.long, device=tokens.device))],
    )
    for (first, last), kept in parts:
        rest, anchors = {}, {}
        for frame, (salient, context) in kept.items():
            order = selection.descending(scores[frame])
            if salient:
                results.append(chosen(frame * cells + order[:salient]))
            rest[frame] = order[salient:].sort().values
            if context:
                here = tokens[frame, rest[frame]].unsqueeze(0)
                distance = selection.scaled_distance(here)
                peaks = selection.peak_scores(
                    distance, min(neighbours, here.shape[1]), noise[frame, rest[frame]].unsqueeze(0)
                )
                anchors[frame] = frame * cells + rest[frame][selection.descending(peaks)[0, :context]].sort().values
        for frame in range(first, last + 1):
            rest.setdefault(frame, torch.arange(cells, device=tokens.device))
        pools = {frame: frame * cells + places for frame, places in rest.items()}
        pool = torch.cat([pools[f] for f in range(first, last + 1)])
        whole_part = slice(first * cells, (last + 1) * cells)
        for frame, places in anchors.items():
            span = whole_part
            if rule != "frame":  # anchors do not gather themselves
                anchored = torch.zeros(len(unit), device=pool.device).scatter(0, places, 1.0)[pool]
                near = pool[anchored.argsort(stable=True)[: len(pool) - len(places)]]
            elif kept[frame].context == whole:
                near, span = pools[frame], slice(frame * cells, (frame + 1) * cells)
            else:
                near = pool
            results.append(gathered(unit, places, near, span, least))
    return by_place(joined(results))


@dataclass(frozen=True)
class FastVID(TokenPruner):
    """FastVID (arXiv 2503.11187): dynamic segments of frames, and in each salient and density-based context tokens.

    The defaults are LLaVA-OneVision's; LLaVA-Video's are `rule="segment", pooling="average"`, Qwen2.5-VL's
    `rule="groups", threshold=0.84, pooling="none"`.

    Parameters
    ----------
    count : int
        c: c - 1 cuts are made however alike the frames are.
    threshold : float
        tau, the similarity of frames below which they are always parted.
    context : float
        d, the share of the budget that is for context tokens.
    period : int
        p: of a segment every p-th frame from its last back has context tokens.
    least : float
        beta, the least weight of a context token in what it gathers.
    neighbours : int
        Of the density.
    noise : float
        Range of a uniform draw added to densities, 1e-6 as released; without it the earlier of equal ones comes first.
    rule : {"frame", "segment", "groups"}
        How the budget is spread: as released for LLaVA-OneVision (each frame its own), for LLaVA-Video (each segment),
        or for Qwen2.5-VL (each segment, without frames that the next repeats).
    ignore : float
        Similarity above which a frame repeats the next one (`groups`).
    frames : {"mean", "head"}
        Where descriptors of frames and scores of tokens come from: the mean of a frame's tokens and the attention they
        receive in the encoder (as released for Qwen2.5-VL), or SigLIP's pooling head, the service `pooling_head`,
        which maps the encoder's features [T, N, D] to [T, D] and [T, N].
    pooling : {"bilinear", "average", "none"}
        How the model pools its videos.
    """

    count: PositiveInt = 8
    threshold: Cosine = 0.9
    context: Share = 0.4
    period: PositiveInt = 4
    least: Share = 0.6
    neighbours: PositiveInt = 4
    noise: NonNegativeFloat = 0.0
    rule: Literal["frame", "segment", "groups"] = "frame"
    ignore: Cosine = 0.95
    frames: Literal["mean", "head"] = "mean"
    pooling: Pooling = "bilinear"

    name: ClassVar[str] = "fastvid"
    exempt = {
        "keep_all": "frames are pooled, and context tokens mixed, at any budget",
        "budget": "the budget is a share of each frame's pooled tokens, and context that does not divide is lost",
        "padding": "a frame has no padding; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"hidden", Reading("hidden", -1, "tower") if self.frames == "head" else "received"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        described: list[Tensor] = []

        def read() -> list[Tensor]:
            hidden, batch, total = signals.hidden.float(), *signals.hidden.shape[:2]
            if self.frames == "mean":
                return [hidden, signals.received.float().mean(1).unsqueeze(-1)]
            if HEAD not in signals.services:
                raise PrunelabError(f"{self.name}: frames='head' reads the service '{HEAD}'; pass it, or take 'mean'")
            features, parts = signals.at(Reading("hidden", -1, "tower")), len(signals.grids)
            if signals.units != total:
                raise PrunelabError(f"{self.name}: frames='head' works on crops of patches alone; take 'mean'")
            results = [signals.services[HEAD](x.unflatten(0, (parts, -1))) for x in features]
            described.extend(frame for frame, _ in results)
            return [hidden, torch.stack([scores.flatten() for _, scores in results]).view(batch, total, 1).float()]

        video = pooled_video(signals, self.name, self.pooling, read)
        tokens, scores = video.maps[0], video.maps[1].squeeze(-1)
        described = described or list(tokens.mean(2))
        frames, cells = scores.shape[1:]
        noise = self.noise * torch.rand(frames, cells, generator=signals.rng, device=video.device)
        per = budget.count(cells)
        return video.plan([self.kept(*x, per, noise)[0] for x in zip(tokens, scores, described, strict=True)])

    def kept(
        self, tokens: Tensor, scores: Tensor, described: Tensor, per: int, noise: Tensor
    ) -> tuple[Outputs, list[Segment]]:
        """What `per` tokens a frame leave of a video [T, N, D] with scores [T, N] and descriptors [T, D]; and its
        segments."""
        if not per and len(tokens) > 1:
            raise PrunelabError(f"{self.name}: the budget keeps no token of a frame; give a larger one")
        similarity = likeness(described)
        cuts, cells = segments(similarity, self.count, self.threshold), tokens.shape[1]
        parts = []
        for part in cuts:
            total = per * (part[1] - part[0] + 1)
            if self.rule == "frame":
                kept = by_frame(part, per, self.context, self.period)
            elif self.rule == "segment":
                kept = by_segment(range(part[0], part[1] + 1), total, self.context, self.period)
            else:
                frames = last_of_groups(similarity, part, self.ignore) if part[0] < part[1] else [part[0]]
                kept = by_segment(frames, total, self.context, self.period, 1, cells if part[0] < part[1] else None)
            kept = {f: Kept(k.salient, min(k.context, cells - k.salient)) for f, k in kept.items()}
            parts.append((part, kept))
        whole = int(per * self.context)
        return left(tokens, scores, parts, whole, self.least, self.neighbours, noise, self.rule), cuts
