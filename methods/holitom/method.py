"""HoliTom (Shao et al., NeurIPS 2025): tokens of a video are merged over time, then in space, then inside the decoder.

Unit: a patch of a frame. Frames are cut into segments within which as many tokens as possible repeat; repeated tokens
become one a segment and are clustered, the others are ranked frame by frame by the attention they receive in the image
encoder. Optionally the decoder merges what is left once more, before one of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import Cosine, NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site, take
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.tokens.video import Outputs, Pooling, by_place, chosen, joined, pooled_video
from prunelab.methods.holitom.segmentation import Segment, frame_similarity, run_lengths, segment, split

# -- what is left of a video -------------------------------------------------------------------------------------------


def effective_ratio(ratio: float, tokens: int, saved: int) -> float:
    """The share to keep of what temporal merging leaves, so that `ratio` of all tokens stays."""
    return min(ratio * tokens / (tokens - saved), 1.0)


def kept_count(units: int, ratio: float) -> int:
    """Units that a frame keeps of those that change: rounded up."""
    return math.ceil(round(units * ratio, 6))


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
    result = selection.cluster(distance, centres)
    merged = result.mix(share)
    frames = torch.arange(first, last + 1, device=tokens.device).unsqueeze(1)
    return Outputs(
        merged.target[0].repeat(length),
        (frames * per + static).flatten(),
        merged.weight[0].repeat(length) / length,
        first * per + static[result.centres[0]],
    )


def dynamic_tokens(attention: Tensor, dynamic: Tensor, part: Segment, keep: int) -> Outputs:
    """The `keep` tokens of each frame, among the places `dynamic` [S], that receive most attention [T, N]."""
    first, last = part
    index, _ = selection.top_k(attention[first : last + 1, dynamic], keep)  # [L, keep]
    frames = torch.arange(first, last + 1, device=attention.device).unsqueeze(1)
    return chosen((frames * attention.shape[1] + dynamic[index]).flatten())


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
        result = pooled_video(  # from here on before packing
            signals,
            self.name,
            self.pooling,
            lambda: (signals.hidden.float(), signals.received.float().mean(1).unsqueeze(-1)),
        )
        tokens, attention = result.maps[0], result.maps[1].squeeze(-1)
        frames, cells = attention.shape[1:]
        ratio = budget.amounts[0] if budget.unit == "ratio" else budget.count(frames * cells) / (frames * cells)
        noise = self.noise * torch.rand(frames, cells, generator=signals.rng, device=result.device)  # one for the batch
        return result.plan([self.merged(x, a, ratio, noise) for x, a in zip(tokens, attention, strict=True)])

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
        results = []
        for part in parts:
            static, dynamic = split(runs, part)
            clusters, keep = round(round(len(static) * ratio, 6)), kept_count(len(dynamic), ratio)
            if frames > 1 and not clusters and not keep:
                raise PrunelabError(
                    f"{self.name}: the budget keeps no token of the frames {part[0]} to {part[1]}; give a larger one"
                )
            if clusters:
                results.append(static_tokens(tokens, static, part, clusters, self.neighbours, self.centre_share, noise))
            results.append(dynamic_tokens(attention, dynamic, part, keep))
        outputs = joined(results)
        return by_place(outputs) if self.order == "grid" else outputs
