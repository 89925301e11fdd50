"""A2SF (Jo and Shin, 2024): accumulated attention with a forgetting factor.

Under a causal mask old tokens are seen by more queries, so that a plain sum of attention (H2O's) favours them. Where
every step first multiplies the sum by a factor below one, tokens of different age compare fairly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import attention
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import Site
from prunelab.common.kv_cache.role import CachePruner, CacheSignals, OwnAttention


def surviving(row: Tensor, evicted: Tensor) -> Tensor:
    """Attention [B, KV, G, N] of one query over what is left of the keys: evicted [B, KV, N] get nothing, the others
    add up to 1 again."""
    row = row.masked_fill(evicted.unsqueeze(2), 0)
    return row / row.sum(-1, keepdim=True)


def step(scores: Tensor, row: Tensor, forgetting: float) -> Tensor:
    """A_n = alpha A_(n-1) + S_n (equation 4), scores [B, KV, N]; row [B, KV, G, N] is summed over a group's heads."""
    # assumption: the paper has no grouped queries; heads that share an entry add up
    return forgetting * scores + row.sum(2)


def query_weights(age: Tensor, forgetting: float, observers: int | None = None) -> Tensor:
    """What each query weighs by its age [M] in tokens: alpha^age, or 1 for the last `observers` and 0 for others."""
    return forgetting ** age.float() if observers is None else (age < observers).float()


class Reading:
    """The scores and the evictions of each head while a text [B, N] is read token by token.

    scores: [B, KV, N]. evicted: [B, KV, N] bool, in the beginning whatever is no token. indices: [B, KV, N] of the
    tokens in their samples. capacity: [B, 1, 1] entries of a head; sink, recent: first and last tokens that always
    stay.
    """

    def __init__(
        self, evicted: Tensor, indices: Tensor, capacity: Tensor, sink: int, recent: int, forgetting: float
    ) -> None:
        self.evicted, self.indices, self.capacity = evicted.clone(), indices, capacity
        self.sink, self.recent, self.forgetting = sink, recent, forgetting
        self.real = ~evicted
        self.scores = torch.zeros(evicted.shape, device=evicted.device)

    def take(self, row: Tensor) -> Tensor:
        """Read on with the attention row [B, KV, G, n + 1] of token n; its attention over what was left. Then the
        score decays and, where a head now holds more than it may, its worst entry goes, the first of equal ones."""
        n = row.shape[-1] - 1
        gone = self.evicted[..., : n + 1].clone()
        gone[..., n] = False  # padding sees itself
        row = surviving(row, gone)
        asks = self.real[..., n, None]  # padding asks nothing
        scores = step(self.scores[..., : n + 1], row * asks.unsqueeze(-1), self.forgetting)
        place = self.indices[..., n, None]
        free = (self.indices[..., : n + 1] >= self.sink) & (self.indices[..., : n + 1] <= place - self.recent)
        free &= ~gone & asks & (place >= self.capacity)
        worst = scores.masked_fill(~free, float("inf")).argmin(-1, keepdim=True)
        self.evicted[..., : n + 1] |= torch.zeros_like(free).scatter(-1, worst, True) & free
        self.scores[..., : n + 1] = scores
        return row


@dataclass(frozen=True)
class A2SF(OwnAttention):
    """The paper's method (arXiv 2407.20485): entries go one by one, while the prompt is read and the answer written.

    Every token of the prompt attends only to what is left when it comes, so that reading is as lossy as writing; it
    goes token by token, because each eviction depends on the one before.

    Parameters
    ----------
    forgetting : float
        alpha (equation 4); 1 is H2O's sum, 0 the current step alone.
    sink, recent : int
        First and last tokens that always stay; the paper keeps neither.
    """

    forgetting: Share = 0.2  # the paper's best values lie between 0.1 and 0.3
    sink: NonNegativeInt = 0
    recent: NonNegativeInt = 0

    name: ClassVar[str] = "a2sf"
    when = "both"
    alike = True

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys", "values"})

    def protected(self, capacity: int) -> tuple[int, int]:
        return self.sink, self.recent

    def attend(self, site: Site, signals: CacheSignals, budget: Budget) -> Tensor | None:
        if not signals.prefill:
            return None
        queries, keys, values = signals.queries, signals.keys, signals.values
        capacity = torch.tensor(self.capacity(budget, signals.prompt), device=keys.device).view(-1, 1, 1)
        if bool((capacity < self.sink + self.recent).any()):
            return None  # `select` says what is wrong
        text = Reading(~signals.prunable, signals.indices, capacity, self.sink, self.recent, self.forgetting)
        outputs = []
        for n in range(keys.shape[2]):  # a recurrence: what a token sees depends on what the last one evicted
            row = attention.causal_rows(queries[:, :, n, None], keys[:, :, : n + 1], signals.scale).squeeze(3)
            outputs.append((text.take(row).to(values.dtype) @ values[:, :, : n + 1]).flatten(1, 2))
        signals.marks["accumulated"], signals.marks["evicted"] = text.scores, text.evicted
        return torch.stack(outputs, 2)

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        if "accumulated" not in signals.marks:  # the cache was filled before the method came
            signals.marks["accumulated"] = torch.zeros(signals.keys.shape[:3], device=signals.keys.device)
            signals.marks["evicted"] = ~signals.prunable
        if not signals.prefill:
            steps = signals.queries.shape[2]
            ages = torch.arange(steps - 1, -1, -1, device=signals.keys.device).float()
            weights = None if steps == 1 else self.forgetting**ages
            past = self.forgetting**steps * signals.marks["accumulated"]
            signals.marks["accumulated"] = past + signals.accumulated(weights)
        return signals.marks["accumulated"].masked_fill(signals.marks["evicted"], float("-inf"))


@dataclass(frozen=True)
class A2SFPrefill(CachePruner):
    """The later released version of arXiv 2407.20485: the prompt is read whole and its cache cut once.

    Parameters
    ----------
    forgetting : float
        alpha; the query q of L weighs alpha^(L - 1 - q).
    recent : int
        Last tokens that always stay.
    observers : int, optional
        Makes it the release's other policy, in which that many last queries weigh 1 and the others nothing.
    """

    forgetting: Share = 0.95
    recent: NonNegativeInt = 16
    observers: PositiveInt | None = None

    name: ClassVar[str] = "a2sf_prefill"

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"})

    def protected(self, capacity: int) -> tuple[int, int]:
        return 0, self.recent

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        age = torch.arange(signals.queries.shape[2] - 1, -1, -1, device=signals.keys.device)
        return signals.accumulated(query_weights(age, self.forgetting, self.observers))
