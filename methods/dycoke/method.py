"""DyCoke (Tao et al., CVPR 2025): frames lose the tokens that repeat an earlier frame's, and of the rest
every step of decoding reads those that it attends to.

Unit: a pooled token of a frame, then an entry of the key-value cache. Both stages are methods of their own and work
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core import attention
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import Cosine, NonNegativeInt, PositiveInt
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.kv_cache.role import CacheSignals, OwnAttention
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.common.tokens.video import Pooling, chosen, pooled_video

# -- stage 1: before the decoder ---------------------------------------------------------------------------------------


def temporal_merging(tokens: Tensor, keep: int, last_group: str = "whole", odd_frame: str = "keep") -> Tensor:
    """Places [K], counted frame by frame, of what stays of a video [T, N, D]: a cut frame's `keep` places least like
    those of the frame before, in that order; frames in theirs.

    Of two frames the second is cut, of four also the third, by its likeness to the first (section 3.2). For the options
    see `DyCoke`.
    """
    frames, cells = tokens.shape[:2]
    even = frames // 2 * 2
    there = even if odd_frame == "drop" else frames
    if not there:
        raise PrunelabError("dycoke: a single frame is lost with odd_frame='drop'; take 'keep' or more frames")
    groups = range(0, frames - 4 if last_group == "whole" else there - 2, 4)  # whose third frame is cut, too
    before = [*range(0, even, 2), *groups]
    cut = [*range(1, even, 2), *(i + 2 for i in groups)]
    order = torch.arange(cells, device=tokens.device).repeat(there, 1)
    if cut:  # frame by frame, each of which a cache holds
        norms = [frame.norm(dim=-1).clamp_min(1e-8) for frame in tokens]
        cosines = [(tokens[i] * tokens[j]).sum(-1) / (norms[i] * norms[j]) for i, j in zip(before, cut, strict=True)]
        order[cut] = torch.stack(cosines).argsort(dim=1, stable=True)
    order += cells * torch.arange(there, device=tokens.device).unsqueeze(1)
    return torch.cat([order[i, : keep if i in cut else cells] for i in range(there)])


@dataclass(frozen=True)
class DyCoke(TokenPruner):
    """DyCoke's first stage (arXiv 2411.15024): no token is averaged, those that repeat are left out.

    The budget is what stays of a cut frame, 1 - k: about half of 32 frames' tokens at 0.3.

    Parameters
    ----------
    last_group : {"whole", "cut"}
        Whether the third frame of the last four stays whole, as released (9 whole frames of 32), or is cut like those
        of other groups, as the paper has it (8).
    odd_frame : {"keep", "drop"}
        Whether a last frame without a partner stays, or is lost as in the released code.
    pooling : {"bilinear", "average", "none"}
        How the model pools its videos.
    """

    last_group: Literal["whole", "cut"] = "whole"
    odd_frame: Literal["keep", "drop"] = "keep"
    pooling: Pooling = "bilinear"

    name: ClassVar[str] = "dycoke"
    ascending = False
    exempt = {
        "keep_all": "frames are pooled at any budget",
        "budget": "the budget is what stays of a frame that is cut; others stay whole",
        "padding": "a frame has no padding; padded samples are refused",
        "saving": "a single picture repeats nothing and stays whole",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        video = pooled_video(signals, self.name, self.pooling, lambda: [signals.hidden.float()])
        keep = budget.count(video.maps[0].shape[2])
        places = [temporal_merging(x, keep, self.last_group, self.odd_frame) for x in video.maps[0]]
        return video.plan([chosen(place) for place in places])


# -- stage 2: while decoding -------------------------------------------------------------------------------------------


def likeness(row: Tensor, before: Tensor | None) -> Tensor:
    """Cosine [B] of the attention row [B, N] to visual tokens with the step's before (0 without one), which may know
    fewer entries."""
    if before is None:
        return row.new_zeros(len(row))
    return nn.functional.cosine_similarity(row, nn.functional.pad(before, (0, row.shape[1] - before.shape[1])), dim=1)


def read_entries(row: Tensor, visual: Tensor, counts: Tensor) -> Tensor:
    """Mask [B, N] of the entries that a step reads: all that are not visual, and the `counts` [B] of the `visual`
    [B, N] ones with the most attention `row` [B, N]."""
    order = row.masked_fill(~visual, -1).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(row.shape[1], device=row.device).expand_as(order)
    return ~visual | (torch.zeros_like(order).scatter(1, order, rank) < counts.unsqueeze(1))


@dataclass(frozen=True)
class DyCokeCache(OwnAttention):
    """DyCoke's second stage (arXiv 2411.15024): what layers from `layer` on read of a video's entries while decoding.

    Nothing leaves the cache, so that entries come back when attention moves. The budget is the share 1 - p of visual
    entries that is read.

    Parameters
    ----------
    layer : int
        l, the first layer that reads less; attention is that of layer l - 1.
    start : int
        Tokens before the video (14 in the chats of LLaVA-OneVision).
    length : int, optional
        Visual tokens; None counts all of the prompt from `start` on. The released code counts one less than there are.
    threshold : float
        Cosine of a step's attention with the one before from which on nothing is chosen.
    settled : {"all", "last"}
        What a step reads from there on: the whole cache, as released, or what was chosen last, as the paper has it.
    """

    layer: PositiveInt = 3
    start: NonNegativeInt = 14
    length: PositiveInt | None = None
    threshold: Cosine = 0.9
    settled: Literal["all", "last"] = "all"

    name: ClassVar[str] = "dycoke_cache"
    exempt = {"budget": "nothing leaves the cache: a step reads less of it"}
    when = "decode"

    def misfit(self, info: ModelInfo) -> str | None:
        if self.layer < info.depth:
            return None
        last = info.depth - 1
        return (
            f"{self.name} reads less from layer {self.layer} on, but this model has layers 0 to {last}; set its layer"
        )

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys", "values"})

    def attend(self, site: Site, signals: CacheSignals, budget: Budget) -> Tensor | None:
        memory = signals.memory
        if signals.prefill:
            memory.clear()
        elif site.layer == self.layer - 1:
            self._look(signals, budget)
        elif site.layer >= self.layer:
            reads = signals.prunable & memory["reads"].unsqueeze(1)
            row = attention.causal_rows(signals.queries, signals.keys, signals.scale, reads)  # [B, KV, G, M, N]
            return (row.to(signals.values.dtype) @ signals.values.unsqueeze(2)).flatten(1, 2)
        return None

    def _look(self, signals: CacheSignals, budget: Budget) -> None:
        """Leave in memory what the layers above read in this step."""
        memory, index = signals.memory, signals.indices[:, 0]
        lengths = [n - self.start if self.length is None else self.length for n in signals.prompt]
        if min(lengths) < 0:
            raise PrunelabError(f"{self.name}: the prompt ends before its start={self.start}; say where the video is")
        size = torch.tensor(lengths, device=index.device).unsqueeze(1)
        visual = (index >= self.start) & (index < self.start + size) & signals.prunable[:, 0]
        row = signals.rows(1).float().mean((1, 2)).squeeze(1).masked_fill(~visual, 0)
        counts = torch.tensor([budget.count(n) for n in lengths], device=index.device)
        moved = likeness(row, memory.get("row")) < self.threshold
        chosen_now = read_entries(row, visual, counts)
        other = torch.ones_like(chosen_now)
        if self.settled == "last" and "reads" in memory:
            known = memory["reads"]
            other = nn.functional.pad(known, (0, row.shape[1] - known.shape[1]), value=True)
        memory["reads"] = torch.where(moved.unsqueeze(1), chosen_now, other)
        memory["row"] = row

    def plan(self, site: Site, signals: CacheSignals, budget: Budget) -> Plan:
        return Plan(Gather(torch.arange(signals.units, device=signals.indices.device).expand_as(signals.indices)))
