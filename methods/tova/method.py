"""TOVA (Oren et al., EMNLP 2024): a transformer as a recurrent network of many states, which at each step forgets the
token that the newest one attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.plan import Site
from prunelab.common.kv_cache.role import CachePruner, CacheSignals


@dataclass(frozen=True)
class TOVA(CachePruner):
    """Keeps what the last query attends to, in the mean over all heads of a layer, which all forget the same token
    (arXiv 2401.06104)."""

    name: ClassVar[str] = "tova"
    when = "both"
    alike = True

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"})

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        last = signals.rows(1).squeeze(3)  # [B, KV, G, N]
        return last.mean((1, 2)).unsqueeze(1).expand(-1, signals.keys.shape[1], -1)
