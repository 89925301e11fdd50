"""Evenly spaced tokens: the content-blind baseline that keeps the whole picture, coarsely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site, Where
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def evenly_spaced(prunable: Tensor, counts: Tensor) -> Tensor:
    """Mask [B, N] of `counts` [B] units of each sample at even steps among its prunable ones [B, N]: of n units, the
    r-th stays where (r + 1) * count / n passes a whole number."""
    number = prunable.long().cumsum(1)  # 1 ... n along the prunable units
    total = number[:, -1:].clamp_min(1)
    stays = (number * counts.unsqueeze(1)) // total > ((number - 1) * counts.unsqueeze(1)) // total
    return stays & prunable


@dataclass(frozen=True)
class UniformTokens(TokenPruner):
    """A baseline: keeps every so-many-th unit.

    Parameters
    ----------
    layers : tuple of int
        0-based layers.
    where : str
        Kind of site; for image and video language models `packed` (before the decoder) or `projected` (before packing).
    positions : str
        How what is kept is numbered, see `Plan`.
    """

    layers: tuple[NonNegativeInt, ...] = (0,)
    where: Where = "packed"
    positions: Positions = "original"

    name: ClassVar[str] = "uniform_tokens"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, self.where) for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        counts = torch.tensor([budget.count(n) for n in signals.available()], device=signals.prunable.device)
        stays = evenly_spaced(signals.prunable, counts)
        return Plan(signals.keep(budget, mask=stays), positions=self.positions)
