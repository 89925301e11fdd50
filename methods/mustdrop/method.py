"""MustDrop (Liu et al., 2024): visual tokens are measured at every stage of their life: encoding, prefill, decoding.

Unit: a patch of the image encoder, then a visual token of the decoder's sequence. Alike patches merge early in the
encoder; a filter of two thresholds drops what the text does not attend to, except for a key set that the encoder's
class token names; and caches keep of the prompt only what was left in the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method
from prunelab.common.core.options import Cosine, NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import Gather, Mix, ModelInfo, Plan, Site
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

CLASS = Reading("cls_row", -1, "encoder")


def windows(grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """The patches [W, n] of every window of a grid, in raster order; what does not fill one is in none (assumption)."""
    height, width = (side // part * part for side, part in zip(grid, window, strict=True))
    indices = torch.arange(grid[0] * grid[1]).view(grid)[:height, :width]
    cut = indices.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2)
    return cut.reshape(-1, window[0] * window[1])


def window_similarity(patches: Tensor, members: Tensor) -> Tensor:
    """Mean cosine [B, W] of all pairs of unlike patches [B, N, D] in each window, members [W, n]."""
    unit = nn.functional.normalize(patches.float(), dim=-1)[:, members]  # [B, W, n, D]
    count = members.shape[1]
    return ((unit @ unit.mT).sum((-2, -1)) - unit.square().sum((-2, -1))) / (count * (count - 1))


def spatial_merge(similarity: Tensor, members: Tensor, patches: int, threshold: float, special: int = 1) -> Mix | None:
    """The windows that are at least so similar become the mean of their patches each: as many as every crop [B] has,
    the most similar first; then come all other patches in raster order, and in front the special tokens. None: no
    window is."""
    count = int((similarity >= threshold).sum(1).min()) if similarity.shape[1] else 0
    if not count:
        return None
    batch, size = len(similarity), members.shape[1]
    chosen = members.to(similarity.device)[selection.descending(similarity)[:, :count]]  # [B, count, n]
    gone = torch.zeros(batch, patches, dtype=torch.bool, device=similarity.device).scatter(1, chosen.flatten(1), True)
    others = gone.int().argsort(dim=1, stable=True)[:, : patches - count * size]
    first = torch.arange(special, device=others.device).expand(batch, -1)
    merged = special + torch.arange(count, device=others.device).repeat_interleave(size).expand(batch, -1)
    stay = special + count + torch.arange(others.shape[1], device=others.device).expand(batch, -1)
    source = torch.cat([first, special + chosen.flatten(1), special + others], 1)
    weight = torch.ones_like(source, dtype=torch.float32)
    weight[:, special : special + count * size] = 1 / size
    return Mix(torch.cat([first, merged, stay], 1), source, weight, special + count + others.shape[1])


def key_set(cls_row: Tensor, rate: float) -> Tensor:
    """The tokens [B, K] that the class token attends to most, best first, for its attention [B, H, N]: a share, rounded
    up."""
    return selection.descending(cls_row.float().mean(1))[:, : math.ceil(rate * cls_row.shape[2])]


def dual_filter(attention: Tensor, image: Tensor, overall: float, single: float) -> Tensor:
    """The image tokens [B, N] that survive: those that receive at least a share `overall` of all attention that the
    text pays to the image, or `single` from one text token; for the rows of text [B, H, T, N], averaged over heads."""
    paid = attention.float().mean(1).masked_fill(~image.unsqueeze(1), 0)
    received = paid.sum(1)
    weak = received < overall * received.sum(1, keepdim=True)
    return image & ~(weak & (paid.amax(1) < single))


@dataclass(frozen=True)
class MustDrop(TokenPruner):
    """MustDrop (arXiv 2411.10803): merges windows of alike patches in the encoder, filters visual tokens in the
    decoder, and trims caches.

    How many tokens stay follows from thresholds, image and text; a budget below 1 is an upper bound on what a filter
    lets pass of the tokens that reach it. The thresholds' defaults are the released ones for 192 tokens on TextVQA.

    Parameters
    ----------
    overall, single : float
        Below both a token is dropped: its share of all attention from text to image, and its largest from one text
        token. Released: 0.001 and 0.001 for 192 tokens, 0.0012 and 0.001 for 128, 0.011 and 0.01 for 64.
    layers : tuple of int, optional
        Decoder layers, from 0, behind which the filter works; None: 2, 6, 10 and 14 of 32, brought to the depth.
    window : (int, int)
        Rows and columns of a window.
    threshold : float
        Mean cosine from which a window merges.
    rate : float
        Share of the encoder's tokens in the key set, which no filter drops.
    trims : int, optional
        From this layer on caches keep of the prompt only what went through the last layer; None: all keep what they
        saw.
    """

    overall: NonNegativeFloat = 0.001
    single: NonNegativeFloat = 0.001
    layers: tuple[NonNegativeInt, ...] | None = None
    window: tuple[PositiveInt, PositiveInt] = (3, 3)
    threshold: Cosine = 0.8
    rate: Share = 0.08
    trims: NonNegativeInt | None = 2

    name: ClassVar[str] = "mustdrop"
    adaptive = True
    positions = "renumber"
    exempt = {
        "budget": "the first stage merges what is alike, whatever the budget",
        "keep_all": "thresholds decide, not the budget",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        behind = [round(layer * info.depth / 32) for layer in (2, 6, 10, 14)] if self.layers is None else self.layers
        filters = sorted({min(layer, info.depth - 2) + 1 if self.layers is None else layer + 1 for layer in behind})
        return [Site(1, "tower"), Site(0, "packed"), *(Site(layer, "input") for layer in filters)]

    def requires(self, site: Site) -> frozenset[Signal]:
        if site.where == "input":
            return frozenset({Reading("attention", site.layer - 1, rows="text")})
        return frozenset({CLASS} if site.where == "packed" else {"hidden"})

    def beside(self, other: Method) -> str | None:
        if other.role == "cache_pruner" and self.trims is not None:
            return f"{self.name} trims the cache itself; take trims=None"
        return super().beside(other)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if site.where == "tower":
            return self.merging(signals)
        everything = Plan(signals.keep(mask=torch.ones_like(signals.prunable)), positions="renumber")
        if site.where == "packed":
            signals.state["key"] = self.keys(signals)
            return everything
        if signals.prunable.device.type == "meta":
            return everything
        image, key = signals.prunable, signals.state["key"]
        (reading,) = (r for r in self.requires(site) if isinstance(r, Reading))
        attention = signals.at(reading)
        stays = dual_filter(attention, image, self.overall, self.single) | (key & image)
        if budget == Budget(1.0):
            return Plan(signals.keep(mask=stays), positions="renumber")
        counts = [
            min(n, budget.count(all_)) for n, all_ in zip(stays.sum(1).tolist(), signals.available(), strict=True)
        ]
        received = attention.float().mean(1).sum(1)
        scores = received / received.amax(1, keepdim=True).clamp_min(1e-30) + 2.0 * stays + 4.0 * key
        return Plan(signals.keep(counts, scores=scores), positions="renumber")

    def merging(self, signals: TokenSignals) -> Plan:
        """The first stage, on the patches of crops as a batch."""
        special = signals.prunable.shape[1] - signals.units
        alone = Plan(signals.keep(Budget(1.0), scores=signals.prunable.float()), positions="renumber")
        members = windows(signals.grids[0], self.window).to(signals.prunable.device)
        patches = signals.hidden[:, special:]
        if not len(members) or patches.device.type == "meta":  # what is alike is in the values
            return alone
        alike = window_similarity(patches, members)
        mix = spatial_merge(alike, members, signals.units, self.threshold, special)
        return alone if mix is None else Plan(mix, positions="renumber")

    def keys(self, signals: TokenSignals) -> Tensor:
        """The tokens [B, N] of the sequence that are in the key set of their picture's crop."""
        result = torch.zeros_like(signals.prunable)
        if result.device.type == "meta" or signals.pictures is None:
            return result
        for sample, own in enumerate(signals.pictures()):
            rows = [picture.at(CLASS).unflatten(2, (len(picture.grids), -1)) for picture in own]  # [1, H, crops, n]
            indices = signals.prunable[sample].nonzero().squeeze(1)
            newlines = (len(indices) - sum(row.shape[2:].numel() for row in rows)) // max(len(own), 1)
            for picture, row in zip(own, rows, strict=True):
                best = key_set(row[0].transpose(0, 1), self.rate)  # [crops, K]
                marked = torch.zeros(row.shape[2:], dtype=torch.bool, device=best.device).scatter(1, best, True)
                key = torch.nn.functional.pad(marked.flatten(), (0, newlines))
                if picture.order is not None and marked.numel() == picture.units:  # none merged: laid out as ever
                    key = torch.nn.functional.pad(marked.flatten(), (0, 1))[picture.order.to(best.device)]
                result[sample, indices[: len(key)]] = key
                indices = indices[len(key) :]
        return result

    def refine(self, site: Site, hidden: Tensor, signals: TokenSignals, plan: Plan) -> Tensor:
        if site.where != "tower" and isinstance(plan.reduce, Gather):  # the key set goes along
            signals.state["key"] = signals.state["key"].gather(1, plan.reduce.index)
        return hidden
