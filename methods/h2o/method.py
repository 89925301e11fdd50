"""H2O (Zhang et al., NeurIPS 2023): the tokens that attention returned to most so far, and the last ones. Beside it
observed attention, the same sum made fair to late tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.attention import grouped
from prunelab.common.core.options import Share
from prunelab.common.core.plan import Site
from prunelab.common.kv_cache.role import CachePruner, CacheSignals


@dataclass(frozen=True)
class H2O(CachePruner):
    """Heavy hitters by accumulated attention, evicted greedily while decoding (arXiv 2306.14048).

    Heads that share keys and values add up.  # assumption: the paper has no grouped queries

    Parameters
    ----------
    recent : float
        Share of the budget that the last tokens get.
    """

    recent: Share = 0.5

    name: ClassVar[str] = "h2o"
    when = "both"
    alike = True

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"})

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        received = signals.accumulated()
        if "received" in signals.marks:
            received = received + signals.marks["received"]
        signals.marks["received"] = received
        return received

    def protected(self, capacity: int) -> tuple[int, int]:
        return 0, int(round(self.recent * capacity, 6))


def per_observer(received: Tensor, indices: Tensor, group: int) -> Tensor:
    """Attention received [B, KV, N], summed over queries and a group's heads, as the mean over the heads and over the
    queries that could see the token at all: those not before its place [B, KV, N]."""
    observers = indices.amax(-1, keepdim=True) - indices + 1
    return received / observers / group


@dataclass(frozen=True)
class ObservedAttention(CachePruner):
    """Mean attention from the queries that see a token, at prefill (a standard of the KVPress library, after
    arXiv 2306.14048)."""

    name: ClassVar[str] = "observed_attention"

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"})

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        group = grouped(signals.queries, signals.keys.shape[1]).shape[2]
        return per_observer(signals.accumulated(), signals.indices, group)
