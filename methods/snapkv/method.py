"""SnapKV (Li et al., NeurIPS 2024): what the end of a prompt attends to is what the answer will.

The last tokens of the prompt observe the others; their mean attention, smoothed along the sequence so that what is kept
comes in clusters, decides which of the prompt's entries stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import PositiveInt
from prunelab.common.core.plan import Site
from prunelab.common.kv_cache.role import CachePruner, CacheSignals


def votes(rows: Tensor, kernel_size: int, pooling: Literal["mean", "max"] = "mean") -> Tensor:
    """Votes [B, KV, N - W] for the tokens before the window, from the attention [B, KV, G, W, N] of its W queries.

    The mean over queries and the heads of a group, pooled over `kernel_size` neighbours; neighbours outside count as 0.
    """
    observed = rows[..., : -rows.shape[3]].mean(3)  # [B, KV, G, N - W]
    if pooling == "mean":  # commutes with the mean over heads
        return F.avg_pool1d(observed.mean(2), kernel_size, 1, kernel_size // 2)
    return F.max_pool1d(observed.flatten(1, 2), kernel_size, 1, kernel_size // 2).unflatten(1, rows.shape[1:3]).mean(2)


@dataclass(frozen=True)
class SnapKV(CachePruner):
    """Prompt compression by an observation window at its end (arXiv 2404.14469).

    Parameters
    ----------
    window_size : int
        Tokens that observe, and always stay.
    kernel_size : int
        Odd width of the pooling.
    pooling : {"mean", "max"}
        What neighbours become.
    """

    window_size: PositiveInt = 32
    kernel_size: PositiveInt = 5
    pooling: Literal["mean", "max"] = "mean"

    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise PrunelabError(f"snapkv needs an odd kernel_size, not {self.kernel_size}")

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"})

    def protected(self, capacity: int) -> tuple[int, int]:
        return 0, self.window_size

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        window = min(self.window_size, signals.units)  # of a shorter prompt nothing lies before the window
        if window == signals.units:
            return torch.zeros_like(signals.prunable, dtype=torch.float32)
        return F.pad(votes(signals.rows(window), self.kernel_size, self.pooling), (0, window))
