"""GlobalCom2 (Liu et al., AAAI 2026): the thumbnail of a large image commands how far each of its crops is compressed.

Unit: a patch of the image encoder, before the decoder. What the class token of the thumbnail looks at decides each
crop's share, and, spread over the crops, has a say in what they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveFloat
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Interest = Literal["logits", "attention"]
Placement = Literal["released", "right"]
Grid = tuple[int, int]


def class_logits(query: Tensor, keys: Tensor, crops: int) -> Tensor:
    """Scores [B, crops, N]: scaled products of every crop's class query [B, H, crops, d] with the keys
    [B, H, crops * N, d] of its patches, averaged over heads."""
    result = torch.einsum("bhcd,bhcnd->bcn", query.float(), keys.float().unflatten(2, (crops, -1)))
    return result * query.shape[-1] ** -0.5 / query.shape[1]


def stitched(x: Tensor, grid: Grid, mosaic: Grid) -> Tensor:
    """What is known of the patches [..., C, N] of crops as one picture [..., rows * height, columns * width]."""
    return x.unflatten(-1, grid).unflatten(-3, mosaic).transpose(-3, -2).flatten(-4, -3).flatten(-2)


def unstitched(x: Tensor, grid: Grid, mosaic: Grid) -> Tensor:
    """The other way round."""
    cut = x.unflatten(-1, (mosaic[1], grid[1])).unflatten(-3, (mosaic[0], grid[0])).transpose(-3, -2)
    return cut.flatten(-2).flatten(-3, -2)


def crop_scales(thumbnail: Tensor, grid: Grid, mosaic: Grid, ratio: float, temperature: float = 10.0) -> Tensor:
    """The share [B, C] that each crop keeps: the ratio, moved by the softmax of what its region of the thumbnail's
    scores [B, N] sums up to; at most 1."""
    height, width = (max(side // number, 1) for side, number in zip(grid, mosaic, strict=True))
    indices = torch.arange(thumbnail.shape[1], device=thumbnail.device)
    row = (indices // grid[1] // height).clamp_max(mosaic[0] - 1)
    column = (indices % grid[1] // width).clamp_max(mosaic[1] - 1)
    sums = thumbnail.new_zeros(len(thumbnail), mosaic[0] * mosaic[1], dtype=torch.float64)
    sums = sums.index_add(1, row * mosaic[1] + column, thumbnail.double())
    risen = ((sums - sums.amax(1, keepdim=True)) / temperature).exp()
    share = risen / (risen.sum(1, keepdim=True) + 1e-8)
    return (ratio * (1 + share - share.mean(1, keepdim=True))).clamp_max(1)


def spread(thumbnail: Tensor, grid: Grid, mosaic: Grid, valid: Tensor) -> Tensor:
    """Global scores [B, C, N] of the crops' patches: the thumbnail's [B, N], resized to the part of the picture that is
    no padding, valid [C, N]; 0 in the padding."""
    whole = stitched(valid, grid, mosaic)
    rows, columns = whole.any(1).nonzero().squeeze(1), whole.any(0).nonzero().squeeze(1)
    picture = thumbnail.new_zeros(len(thumbnail), *whole.shape)
    sized = nn.functional.interpolate(thumbnail.view(-1, 1, *grid), (len(rows), len(columns)), mode="bilinear")
    picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = sized[:, 0]
    return unstitched(picture, grid, mosaic)


def kept_of_crops(local: Tensor, spread_out: Tensor, valid: Tensor, scales: Tensor) -> Tensor:
    """Which patches [B, C, N] stay: of each crop's valid ones the share with the largest sum of its own scores and the
    global ones, each normalised over them."""
    valid = valid.to(local.device)
    own, thumbnail = (nn.functional.normalize(x.float() * valid, dim=-1) for x in (local, spread_out))
    scores = (own + thumbnail).masked_fill(~valid, float("-inf"))
    rank = selection.descending(scores).argsort(-1)
    return rank < (valid.sum(-1) * scales).long().unsqueeze(-1)


def placed(kept: Tensor, valid: Tensor, grid: Grid, mosaic: Grid, how: Placement) -> tuple[Tensor, Tensor, Tensor]:
    """Kept patches [B, C, N] in the order in which a decoder reads them, row by row over the picture: their numbers
    [B, K], which of them are real, and the picture's cell of each, [B, K].

    The released code takes a patch's number among the valid ones of its crop for its cell, so that in a picture with
    padding tokens move up.
    """
    batch, crops, patches = kept.shape
    cells = stitched(torch.arange(crops * patches).view(crops, patches), grid, mosaic).flatten().argsort()
    cells = cells.view(crops, patches).to(kept.device)  # of each patch
    if how == "released":
        number = (valid.long().cumsum(-1) - 1).clamp_min(0).to(kept.device)
        cells = cells.gather(1, number)
    ranked = cells.expand(batch, -1, -1).flatten(1).masked_fill(~kept.flatten(1), crops * patches)
    count = kept.flatten(1).sum(1)
    order = ranked.argsort(dim=1, stable=True)[:, : int(count.max())]
    return order, torch.arange(order.shape[1], device=order.device) < count.unsqueeze(1), ranked.gather(1, order)


@dataclass(frozen=True)
class GlobalCom2(TokenPruner):
    """GlobalCom2 (arXiv 2501.05179): compresses the thumbnail of a large image and, as it says, each of its crops.

    The budget is the retention ratio (0.25 in the paper) of the thumbnail, and in the mean of the crops without their
    padding. A single crop keeps its best; a budget of everything keeps everything.

    Parameters
    ----------
    temperature : float
        Of the softmax over the crops' regions.
    interest : {"logits", "attention"}
        What the class token is interested in: products before the softmax, as released, or attention, as written.
    layer : int, optional
        The layer of the image encoder that they are of; None: the last of all.
    placement : {"released", "right"}
        Where kept tokens stand among each other in pictures with padding; see `placed`.
    """

    temperature: PositiveFloat = 10.0
    interest: Interest = "logits"
    layer: NonNegativeInt | None = None
    placement: Placement = "released"

    name: ClassVar[str] = "globalcom2"
    positions = "renumber"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[Reading]:
        return frozenset(self.readings())

    def readings(self) -> list[Reading]:
        """The class token's attention, or its queries and everybody's keys."""
        layer = -1 if self.layer is None else self.layer
        if self.interest == "attention":
            return [Reading("cls_row", layer, "encoder")]
        return [Reading("queries", layer, "encoder", "class"), Reading("keys", layer, "encoder")]

    def scores(self, signals: TokenSignals, crops: int) -> Tensor:
        """Of the patches of every crop, [B, crops, N]."""
        results = [signals.at(reading) for reading in self.readings()]
        if self.interest == "attention":
            return results[0].float().mean(1).unflatten(1, (crops, -1))
        return class_logits(results[0], results[1], crops)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        crops = len(signals.grids)
        scores, units = self.scores(signals, crops), signals.units
        if crops == 1 or budget.count(units) == units:
            return Plan(signals.keep(budget, scores=scores.flatten(1)), positions=self.positions)
        mosaic, grid, patches = signals.mosaic, signals.grids[0], scores.shape[2]
        if mosaic is None or signals.order is None:
            raise PrunelabError(f"{self.name} compresses a thumbnail and its crops; it knows no other grids than those")
        ratio = budget.amounts[0] if budget.unit == "ratio" else budget.count(units) / units
        stays = int(round(patches * ratio, 6))
        if scores.device.type == "meta":  # what each crop keeps is in the values
            every = torch.arange(stays + int((units - patches) * ratio), device=scores.device)
            return Plan(Gather(every.expand(len(scores), -1)), positions=self.positions)
        own = signals.order[signals.order >= patches] - patches
        valid = torch.zeros(units - patches, dtype=torch.bool).index_fill(0, own, True).view(crops - 1, patches)
        best = selection.descending(scores[:, 0])[:, :stays]  # in this order, as released
        scales = crop_scales(scores[:, 0], grid, mosaic, ratio, self.temperature)
        spread_out = spread(scores[:, 0], grid, mosaic, valid)
        kept = kept_of_crops(scores[:, 1:], spread_out, valid, scales)
        order, real, cell = placed(kept, valid, grid, mosaic, self.placement)
        width = mosaic[1] * grid[1]
        layout = torch.stack([torch.ones_like(cell), cell // width, cell % width], -1)
        layout = torch.cat([torch.full((*best.shape, 3), -1, device=cell.device), layout], 1)
        index, real = torch.cat([best, order + patches], 1), torch.cat([torch.ones_like(best).bool(), real], 1)
        return Plan(Gather(index, None if len(index) == 1 else real), layout=layout, positions=self.positions)
