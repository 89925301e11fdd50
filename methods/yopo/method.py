"""YOPO (Zhang et al., 2024): visual tokens need fewer efforts than text. All of them stay, and a decoder computes less
for them.

Unit: the work that a layer does for a visual token: attention within its neighbourhood, heads that look at the picture
at all, a part of the MLP, and none of the last layers' attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import attention
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import Effort, ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.yopo.heads import ACTIVE

Heads = Literal["all", "7b_8", "7b_16", "7b_24", "13b_5", "13b_10", "13b_20", "13b_30"]


def neighbour_mask(height: int, width: int, window: int) -> Tensor:
    """Which patches [N, N] of a grid attend to each other: those within a square around each, later ones too."""
    place = torch.arange(height * width)
    return attention.neighbours(place // width, place % width, window)


def visual_ratio(weights: Tensor, start: int, length: int) -> Tensor:
    """How much more a head looks at the picture than at the rest, [..., H]: its attention [..., H, S, S] to visual
    tokens, `length` from `start` on, summed over queries, over that to all others."""
    visual = weights[..., start : start + length].sum((-2, -1))
    others = weights[..., :start].sum((-2, -1)) + weights[..., start + length :].sum((-2, -1))
    return visual / others


def active_heads(ratios: Tensor, threshold: float, votes: int, always: int = 2) -> Tensor:
    """The heads [L, H] whose ratio [L, samples, H] is above the threshold in more than so many samples; in the first
    layers all are."""
    above = ratios > threshold
    above[:always] = ratios[:always] >= 0
    return above.sum(1) > votes


def released(heads: Heads) -> Tensor | None:
    """The authors' active heads [L, H], None for all."""
    if heads == "all":
        return None
    return torch.tensor([[bit == "1" for bit in f"{int(w, 16):0{4 * len(w)}b}"] for w in ACTIVE[heads].split()])


@dataclass(frozen=True)
class YOPO(TokenPruner):
    """YOPO (arXiv 2410.06169): visual tokens attend to their neighbours, through active heads, up to some layer, and
    use a part of each MLP. None of them leaves.

    The budget is the share of an MLP's neurons that visual tokens use: 0.5 for the paper's `mlpcut_ratio` of 2.

    Parameters
    ----------
    window : int
        Side of the square within which visual tokens attend to each other; 0: to all before.
    layers : int
        The first layer, from 0, whose attention nobody pays to visual tokens.
    heads : str
        The authors' masks of active heads for LLaVA-1.5-7B and 13B by the number of them a layer, or `all`.
    """

    window: NonNegativeInt = 5
    layers: NonNegativeInt = 20
    heads: Heads = "all"

    name: ClassVar[str] = "yopo"
    eases: ClassVar[bool] = True
    exempt = {
        "budget": "no token leaves; the budget is a share of neurons",
        "keep_all": "attention within windows is another one, whatever the share of neurons",
    }

    def active(self) -> Tensor | None:
        """The heads [L, H] that look at visual tokens, None for all."""
        return released(self.heads)

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        active = self.active()
        if active is not None and active.shape != (info.depth, info.heads):
            raise PrunelabError(
                f"{self.name}: heads={self.heads} are of {len(active)} layers with {active.shape[1]} heads, and this"
                f" model has {info.depth} with {info.heads}; take heads=all"
            )
        return [Site(0, "input")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        return Plan(signals.keep(Budget(1.0), mask=signals.prunable))

    def effort(self, layer: int, info: ModelInfo, budget: Budget) -> Effort:
        if budget.unit != "ratio":
            raise PrunelabError(f"{self.name}: the budget is a share of an MLP's neurons, such as 0.5")
        active = self.active()
        heads = None if active is None else tuple(active[layer].tolist())
        return Effort(self.window, heads, layer < self.layers, budget.amounts[0])
