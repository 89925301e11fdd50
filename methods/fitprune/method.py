"""FitPrune (Ye et al., AAAI 2025): every layer deletes a few image tokens, as many as keep attention's distribution.

Unit: an image token of the decoder's sequence. How many each layer deletes is a recipe, fitted once on a few samples so
that a budget of FLOPs is met; which ones is decided by the attention that they receive from image and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.fitprune.recipes import left, left_of


def text_behind(image: Tensor, valid: Tensor | None = None) -> Tensor:
    """The tokens [B, N] behind the last image token, for masks of image tokens and of those that count."""
    seen = image.long().cumsum(1)
    behind = (seen == seen[:, -1:]) & ~image
    return behind if valid is None else behind & valid


def contributions(attention: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Self- and cross-attention that each token receives, [B, N] twice: the column sums over image rows and over text
    rows, divided by their number, of the attention [B, H, N, N] of a layer, its largest head at each place.

    Without text behind the image cross-attention is 1 everywhere (assumption).
    """
    most = attention.float().amax(1)
    own, cross = (
        (rows.float().unsqueeze(1) @ most).squeeze(1) / rows.sum(1, keepdim=True).clamp_min(1) for rows in (image, text)
    )
    return own, torch.where(text.any(1, keepdim=True), cross, 1.0)


def prefix(received: Tensor, image: Tensor, floor: Tensor) -> Tensor:
    """The image tokens [B, N] that could go by one kind of attention: sorted from the least that they receive, as many
    as leave a sum of at least `floor` [B], less one, as released."""
    least, order = received.masked_fill(~image, float("inf")).sort(dim=1, stable=True)
    least = torch.where(least.isinf(), 0.0, least)
    left = least.sum(1, keepdim=True) - torch.cat([torch.zeros_like(least[:, :1]), least.cumsum(1)[:, :-1]], 1)
    count = (left < floor.unsqueeze(1)).int().argmax(1)  # the first that leaves too little
    never = ~(left < floor.unsqueeze(1)).any(1)
    count = torch.where(never, image.sum(1), count) - 1
    rank = torch.arange(image.shape[1], device=image.device)
    return torch.zeros_like(image).scatter(1, order, rank < count.unsqueeze(1)) & image


def deletable(own: Tensor, cross: Tensor, image: Tensor, alpha: float, sums: tuple[Tensor, Tensor]) -> Tensor:
    """What a layer deletes while a recipe is fitted, [B, N] bool: tokens in both prefixes, each of which leaves 1 -
    alpha of what the unpruned model's image tokens received there, `sums` ([B] of self and of cross)."""
    kinds = zip((own, cross), sums, strict=True)
    by_self, by_cross = (prefix(received, image, (1 - alpha) * total) for received, total in kinds)
    return by_self & by_cross


@dataclass(frozen=True)
class FitPrune(TokenPruner):
    """FitPrune (arXiv 2409.10197): deletes image tokens in every layer by a recipe, those of the smallest product of
    self- and cross-attention.

    The budget is the share of the decoder's FLOPs for visual tokens that stays. 0.4 is the authors' recipe of 60 %; for
    what they did not fit, and other decoders, theirs are interpolated (`recipes.left`).

    Parameters
    ----------
    recipe : tuple of int, optional
        How many tokens each layer deletes, one's own (`fitting.fit`); the budget is then 1.
    """

    recipe: tuple[NonNegativeInt, ...] | None = None

    name: ClassVar[str] = "fitprune"
    exempt = {"budget": "the budget is a share of FLOPs, and a recipe says what each layer keeps of the tokens"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if self.recipe is not None and len(self.recipe) != info.depth:
            raise PrunelabError(
                f"{self.name}: the recipe is for {len(self.recipe)} layers, this model has {info.depth}; fit one for it"
            )
        return [Site(layer, "input") for layer in range(1, info.depth)]  # what layer - 1 deletes is gone here

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"attention"})

    def kept(self, site: Site, info: ModelInfo, budget: Budget, tokens: int) -> int:
        """How many of so many image tokens a layer sees."""
        if self.recipe is not None:
            if budget != Budget(1.0):
                raise PrunelabError(f"{self.name}: a recipe of one's own says it all; give the budget 1")
            return left_of(self.recipe, tokens)[site.layer]
        share = budget.amounts[0] if budget.unit == "ratio" else budget.count(tokens) / max(tokens, 1)
        return left(1 - share, info.depth, tokens)[site.layer]

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        now, every = signals.available(), signals.state.setdefault("every", signals.available())
        counts = [self.kept(site, signals.info, budget, tokens) for tokens in every]
        if all(count >= here for count, here in zip(counts, now, strict=True)):
            return Plan(signals.keep(Budget(1.0), scores=torch.zeros_like(signals.prunable, dtype=torch.float32)))
        text = text_behind(signals.prunable, signals.valid)
        own, cross = contributions(signals.attention, signals.prunable, text)
        return Plan(signals.keep(counts, scores=own * cross))
