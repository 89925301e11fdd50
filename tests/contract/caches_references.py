"""Minimal reference methods of the rooms kv_cache and experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Site
from prunelab.common.experts.role import ExpertPruner, ExpertSignals
from prunelab.common.kv_cache.role import CachePruner, CacheSignals


@dataclass(frozen=True)
class NewestCache(CachePruner):
    """Keeps the newest cache entries, at every step."""

    name: ClassVar[str] = "reference_newest_cache"
    when = "both"
    alike = True

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        return signals.indices.float()


@dataclass(frozen=True)
class WeakestExperts(ExpertPruner):
    """Leaves out the choices of least weight among all tokens, a token's first choice never; `protect` of a prompt's
    tokens, those of largest norm times attention received, keep all."""

    protect: float = 0.0
    name: ClassVar[str] = "reference_experts"

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"norms", "received"} if self.protect else ())

    def plan(self, site: Site, signals: ExpertSignals, budget: Budget) -> Tensor:
        tokens, choices = signals.weights.shape
        first = signals.weights == signals.weights.amax(-1, keepdim=True)
        share = (signals.weights / signals.weights.sum(-1, keepdim=True)).masked_fill(first, float("inf"))
        if self.protect and signals.prefill:
            important = (signals.norms * signals.received).topk(int(self.protect * tokens)).indices
            share[important] = float("inf")
        best = share.flatten().topk(budget.count(tokens * choices)).indices
        return first | torch.zeros_like(first).flatten().scatter(0, best, True).view_as(first)
