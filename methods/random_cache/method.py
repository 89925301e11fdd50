"""Random cache entries: the content-blind baseline of the cache-pruning tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import Site
from prunelab.common.kv_cache.role import CachePruner, CacheSignals


@dataclass(frozen=True)
class RandomCache(CachePruner):
    """Keeps prompt entries by lot, drawn anew for every layer, head and sample (a baseline without a paper).

    Parameters
    ----------
    window_size : int
        Last tokens that always stay.
    """

    window_size: NonNegativeInt = 1

    name: ClassVar[str] = "random_cache"
    exempt = {"batch": "every sample draws its own lot", "padding": "the lots of real tokens depend on the padding"}

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        return torch.rand(signals.indices.shape, generator=signals.rng, device=signals.indices.device)

    def protected(self, capacity: int) -> tuple[int, int]:
        return 0, min(self.window_size, capacity)
