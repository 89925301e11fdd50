"""StreamingLLM (Xiao et al., ICLR 2024): the first tokens, on which softmax dumps attention it has no use for, and the
last ones. Beside it the plain window, which lacks the first and shows what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import Site
from prunelab.common.kv_cache.role import CachePruner, CacheSignals


def recency(signals: CacheSignals) -> Tensor:
    """Scores [B, KV, N] by which later tokens are better."""
    return signals.indices.float()


@dataclass(frozen=True)
class StreamingLLM(CachePruner):
    """Keeps the first tokens and as many of the last as the budget has room for (arXiv 2309.17453).

    Keys keep the rotations of their own positions; the paper renumbers what is in the cache, so that it can run beyond
    the model's context.

    Parameters
    ----------
    sink : int
        First tokens that always stay.
    """

    sink: NonNegativeInt = 4

    name: ClassVar[str] = "streaming_llm"
    when = "both"
    alike = True

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        return recency(signals)

    def protected(self, capacity: int) -> tuple[int, int]:
        return self.sink, 0


@dataclass(frozen=True)
class Window(CachePruner):
    """Keeps the last tokens alone: local attention (the baseline of arXiv 2309.17453)."""

    name: ClassVar[str] = "window"
    when = "both"
    alike = True

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        return recency(signals)
