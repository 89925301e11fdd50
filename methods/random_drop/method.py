"""Random token dropping: the content-blind baseline of the token-pruning tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.roles import Signals, TokenPruner
from common.types import ModelInfo, Site


@dataclass(frozen=True)
class RandomDrop(TokenPruner):
    """Keeps patches by lot, drawn anew for every sample, behind the blocks in `layers` (0-based)."""

    layers: tuple[int, ...] = (2, 5, 8)

    name: ClassVar[str] = "random_drop"
    exempt = {
        "batch": "every sample draws its own lot",
        "padding": "the lots of real tokens depend on how many tokens are drawn for",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "block_output") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def score(self, site: Site, signals: Signals) -> Tensor:
        shape, device = signals.prunable.shape, signals.prunable.device
        return torch.rand(shape, generator=signals.rng, device=device)
