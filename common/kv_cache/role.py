"""The role of methods that prune entries of a key-value cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import attention, selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.core.plan import Gather, Plan, Site
from prunelab.common.core.signals import Signals


class CacheSignals(Signals):
    """What a layer of a decoder lets a cache pruner see: N entries a key-value head, the newest M of them just added.

    Signals by name: `queries` [B, H, M, d] of the forward pass at hand, `keys` / `values` [B, KV, N, d] of the cache as
    attention uses them, `hidden` [B, M, D] that entered the layer's attention, `outputs` [B, H, M, d] of its heads
    (not before it attends), `received` [B, KV, N] (`accumulated` with all weights 1). What shall read rows requires
    `queries` and `keys`.

    places [B, KV, N]: number of each entry's token among the sample's own; valid [B, KV, N] or None: entries that
    count. prompt [B]: tokens each sample began with, which ratios count from. marks: tensors [B, KV, N] by name that
    the method leaves at a layer; they follow the entries from step to step, new entries bring zeros. memory: what the
    method leaves for all layers while the cache lives. prefill: whether the cache was empty before this pass. ahead:
    entries at the end that a draft wrote, which never stay. asking [B, M]: queries that are no padding, None where
    all count.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Tensor]],
        *,
        scale: float,
        places: Tensor,
        prompt: Tensor,
        marks: dict[str, Tensor],
        prefill: bool,
        ahead: int = 0,
        asking: Tensor | None = None,
        valid: Tensor | None = None,
        required: frozenset[str] | None = None,
        **rest: Any,
    ) -> None:
        prunable = torch.ones_like(places, dtype=torch.bool) if valid is None else valid
        if required and "received" in required:
            required |= {"queries", "keys"}
        rest |= {"required": required}
        super().__init__(sources, prunable=prunable, units=places.shape[-1], valid=valid, **rest)
        self.places = places
        self.scale, self.prompt, self.marks, self.prefill, self.ahead = scale, prompt, marks, prefill, ahead
        self.asking = asking

    def rows(self, last: int) -> Tensor:
        """Causal attention [B, KV, G, W, N] of the last `last` queries, by key-value head and group."""
        queries = self.queries[:, :, -last:]
        if last > queries.shape[2]:
            raise PrunelabError(f"the pass brought {queries.shape[2]} queries, not the {last} whose attention is read")
        return attention.causal_rows(queries, self.keys, self.scale, self.valid_for_rows())

    def accumulated(self, weights: Tensor | None = None) -> Tensor:
        """Attention [B, KV, N] that the entries receive from the pass's queries, weighted by weights [M]; summed over
        the query heads of a group."""
        return attention.accumulated(self.queries, self.keys, self.scale, weights, self.valid_for_rows(), self.asking)

    def valid_for_rows(self) -> Tensor | None:
        """The entries that queries see: what a draft wrote is seen, though it never stays."""
        if self.valid is None or not self.ahead:
            return self.valid
        seen = self.valid.clone()
        seen[..., -self.ahead :] = True
        return seen


class CachePruner(Method):
    """Prunes entries of a key-value cache, per layer and key-value head. Fill in `score`, or override what does not
    fit. The budget counts entries of one head; ratios count from the prompt.

    when: after the pass that fills the empty cache (`prefill`), after each later one (`decode`), or `both`.
    storage: `bitmap` keeps entries that are `settled` as bitmaps and nonzero numbers.
    """

    role: ClassVar[str] = "cache_pruner"
    when: ClassVar[Literal["prefill", "decode", "both"]] = "prefill"
    storage: ClassVar[Literal["dense", "bitmap"]] = "dense"

    @abstractmethod
    def requires(self, site: Site) -> frozenset[str]:
        """Names of the signals read at a layer."""

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        """Importance [B, KV, N] of every cache entry, larger is better."""
        raise TypeError(f"{type(self).__name__} fills in neither score() nor plan()")

    def spared(self, capacity: int) -> tuple[int, int]:
        """How many of the first and of the last tokens always stay, where a head keeps `capacity` entries."""
        return 0, 0

    def plan(self, site: Site, signals: CacheSignals, budget: Budget) -> Plan:
        """Entries that stay, [B, KV, K] in original order."""
        return Plan(self.select(self.score(site, signals), signals, budget))

    def capacity(self, signals: CacheSignals, budget: Budget) -> list[int]:
        """Entries a head of each sample may keep; the whole of the prompt stands for no limit."""
        whole = budget.amounts == ((0,) if budget.unit == "removed" else (1,)) and budget.unit != "count"
        if whole or budget.unit == "count":
            return [1 << 30 if whole else int(budget.amounts[0])] * len(signals.prompt)
        return [budget.count(n) for n in signals.prompt.tolist()]

    def select(self, scores: Tensor, signals: CacheSignals, budget: Budget) -> Gather:
        """The spared and the best-scored entries of each head under the budget, in original order."""
        assert signals.places is not None
        counts = torch.tensor(self.capacity(signals, budget), device=scores.device)
        available = signals.prunable.sum(-1)  # [B, KV]
        sink, window = (
            torch.tensor(part, device=scores.device).view(-1, 1, 1)
            for part in zip(*(self.spared(n) for n in counts.tolist()))
        )
        least = (sink + window).squeeze(-1)
        if bool(((counts.unsqueeze(1) < available) & (counts.unsqueeze(1) < least)).any()):
            raise PrunelabError(
                f"a cache of {int(counts.min())} entries cannot hold the {int(least.max())} first and last tokens that"
                f" {self.name} always keeps; raise the budget or lower its sink or window"
            )
        newest = signals.places.masked_fill(~signals.prunable, -1).amax(-1, keepdim=True)
        kept = (signals.places < sink) | (signals.places > newest - window)
        ranked = scores.float().masked_fill(kept, float("inf")).masked_fill(~signals.prunable, float("-inf"))
        counts = counts.unsqueeze(1).clamp(max=available)
        best = selection.keep_first(selection.descending(ranked).flatten(0, 1), counts.flatten())
        shape = (*scores.shape[:2], -1)
        return Gather(best.index.view(shape), None if best.valid is None else best.valid.view(shape))

    def thin(
        self, site: Site, keys: Tensor, values: Tensor, signals: CacheSignals, budget: Budget
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, KV, N, d] with zeros where single numbers are pruned."""
        return keys, values

    def settled(self, entries: int) -> int:
        """How many of the first of so many entries `thin` will never change again."""
        return 0

    def attend(self, site: Site, signals: CacheSignals, budget: Budget) -> Tensor | None:
        """The heads' outputs [B, H, M, d], for methods that change attention itself; None leaves it to the model's."""
        return None

    def lookahead(self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]) -> Tensor:
        """Tokens [B, A] that may follow the prompt [B, N]; the target reads them for their queries alone."""
        return tokens[:, :0]

    def shorten(
        self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]
    ) -> Tensor | None:
        """Places [B, K] of the prompt tokens [B, N] that the target reads at all, closed up; None: all."""
        return None
