"""VisionZip (Yang et al., CVPR 2025): the few patches that hold an image's information, and what the rest says in sum.

Unit: a feature of the image encoder, before the projector. The class token's attention chooses dominant patches; all
others are merged into a few contextual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeInt, Share
from prunelab.common.core.plan import Mix, ModelInfo, Plan, Positions, Site, take
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def dominance(attention: Tensor) -> Tensor:
    """The score of every token [B, N]: the attention [B, H, N] that it gets, summed over heads."""
    return attention.sum(1)


def contextual_slots(metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of `count` contextual tokens each token [B, M] goes to, by the cosine of metrics [B, M, d], and its weight.

    Every s-th token is a target, s = M // count. A contextual token is its target and the mean of all that go to it:
    the weights of one add up to two, or to one where nobody chose it.
    """
    batch, tokens, _ = metric.shape
    unit = torch.nn.functional.normalize(metric, dim=-1)
    indices = torch.arange(count, device=metric.device) * max(1, tokens // count)
    slot = (
        (unit @ unit[:, indices].transpose(1, 2))
        .argmax(-1)
        .scatter(1, indices.expand(batch, -1), torch.arange(count, device=metric.device).expand(batch, -1))
    )
    joins = torch.ones_like(unit[..., 0]).index_fill(1, indices, 0)
    total = joins.new_zeros(batch, count).scatter_add(1, slot, joins)
    weight = torch.where(joins > 0, 1 / total.gather(1, slot).clamp_min(1), 1)
    return slot, weight


def zipped(scores: Tensor, metric: Tensor, special: int, dominant: int, contextual: int) -> Mix:
    """Tokens [B, N] of one crop as `special` first ones, `dominant` patches in raster order and `contextual` mixtures
    of the others, by scores [B, N] and metrics [B, N, d]. Entry e is token e; without contextual tokens others go."""
    batch, total = scores.shape
    ranked = scores.index_fill(1, torch.arange(special, device=scores.device), float("inf"))
    kept, _ = selection.top_k(ranked, special + dominant)
    own = torch.arange(kept.shape[1], device=kept.device).expand(batch, -1)
    slot = torch.zeros(batch, total, dtype=torch.long, device=kept.device).scatter(1, kept, own)
    stays = torch.zeros_like(scores).scatter(1, kept, 1)
    every = torch.arange(total, device=kept.device).expand(batch, -1)
    outputs = kept.shape[1] + contextual
    if not contextual:
        return Mix(slot, every, stays, outputs)
    rest = stays.argsort(dim=1, stable=True)[:, : total - kept.shape[1]]  # ascending
    where, weight = contextual_slots(take(metric, rest), contextual)
    return Mix(slot.scatter(1, rest, where + kept.shape[1]), every, stays.scatter(1, rest, weight), outputs)


def stitched(mix: Mix, places: Tensor, special: int, dominant: int, crops: int) -> Tensor:
    """The place [B, crops, K] of each output of crops [B * crops], K each: those of the thumbnail, then the dominant
    patches of all other crops in raster order over them, at places [crops - 1, N], then their class tokens, then their
    contextual tokens, crop by crop."""
    outputs, units = mix.outputs, places.shape[1]
    crop = torch.arange(crops, device=places.device).unsqueeze(1)
    output = torch.arange(outputs, device=places.device).expand(crops, -1)
    source = torch.zeros(len(mix.target), outputs, dtype=torch.long, device=places.device)
    source = source.scatter(1, mix.target, mix.source).unflatten(0, (-1, crops))[..., special : special + dominant]
    key = torch.where(
        output < special, outputs + crops * units + crop, (units + 1 + outputs) * crops + outputs * crop + output
    )
    key = torch.where(crop == 0, output, key).expand(len(source), -1, -1).clone()
    patch = places.expand(len(source), -1, -1).gather(2, source[:, 1:] - special)
    key[:, 1:, special : special + dominant] = outputs + patch
    return key.flatten(1).argsort(1).argsort(1).view_as(key)


def raster(grid: tuple[int, int], mosaic: tuple[int, int]) -> Tensor:
    """Places [crops, N], row by row over all crops, of the patches of `mosaic` (rows, columns) crops of a grid."""
    (height, width), (rows, columns) = grid, mosaic
    number = torch.arange(rows * columns * height * width).view(rows, height, columns, width)
    return number.transpose(1, 2).reshape(rows * columns, height * width)


@dataclass(frozen=True)
class VisionZip(TokenPruner):
    """VisionZip (arXiv 2412.04467): keeps the class token and the patches that it attends to most, and merges all
    others into a few tokens, in every crop alike.

    A number in the budget is that of a crop, class token included. An encoder without a class token has none to keep,
    and its patches are chosen by the attention that they receive from all.

    Parameters
    ----------
    share : float
        Share of the budget that is contextual tokens, rounded: the paper's 54 and 10, 108 and 20, 162 and 30.
    contextual : int, optional
        Their number, in place of a share (30 of 221 in the released defaults).
    where : {"encoded", "projected"}
        Before the projector, or behind it, without the class token: for encoders whose projector joins patches.
    positions : str
        Merged tokens have no place in the picture, so all are numbered anew.
    """

    share: Share = 0.15625
    contextual: NonNegativeInt | None = None
    where: Literal["encoded", "projected"] = "encoded"
    positions: Positions = "renumber"

    name: ClassVar[str] = "visionzip"
    exempt = {
        "budget": "the class token counts among the kept ones",
        "keep_all": "patches are merged, and the class token is read, whatever the budget",
        "padding": "an encoder's crops have no padding",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        own = self.where == "encoded" and (info.tower is None or info.tower.class_token)
        return [Site(0, self.where, class_token=own)]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"cls_row" if site.class_token else "received", Reading("keys", -1, "tower")})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        crops = len(signals.grids)
        scores = dominance(signals.cls_row if site.class_token else signals.received)
        metric = signals.at(Reading("keys", -1, "tower")).mean(1)
        scores, metric = (x.unflatten(1, (crops, -1)).flatten(0, 1) for x in (scores, metric))  # a crop a row
        patches, units = signals.units // crops, scores.shape[1]
        special = units - patches
        # of every crop something is read; a number counts the class token, too
        tokens = max(budget.count(units if budget.unit == "count" else patches), special, 1)
        contextual = round(tokens * self.share) if self.contextual is None else self.contextual
        contextual = min(contextual, tokens - special)
        dominant = tokens - special - contextual
        mix = zipped(scores, metric, special, dominant, contextual)
        if crops == 1:
            return Plan(mix, positions=self.positions)
        whole = selection.of_crops(mix, crops, units)
        if signals.mosaic is not None:
            places = raster(signals.grids[0], signals.mosaic).to(mix.target.device)
            order = stitched(mix, places, special, dominant, crops)
            whole = replace(whole, target=order.flatten(1).gather(1, whole.target))
        nowhere = torch.full(
            (len(whole.target), whole.outputs, 3), -1, device="cpu"
        )  # no newlines, and nothing is cut off
        return Plan(whole, layout=nowhere, positions=self.positions)
