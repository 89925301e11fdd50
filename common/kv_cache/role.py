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
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.core.signals import Signals
from prunelab.common.kv_cache.layer import AllButOne


class CacheSignals(Signals):
    """What a layer of a decoder lets a cache pruner see: N entries a key-value head, the newest M of them just added.

    Signals by name: `queries` [B, H, M, d] of the forward pass at hand, `keys` / `values` [B, KV, N, d] of the cache as
    attention uses them, `hidden` [B, M, D] that entered the layer's attention, `outputs` [B, H, M, d] of its heads
    (not before it attends), `received` [B, KV, N] (`accumulated` with all weights 1). What shall read rows requires
    `queries` and `keys`.

    indices [B, KV, N]: number of each entry's token among the sample's own; valid [B, KV, N] or None: entries that
    count. seen: tokens so far, padding among them. prompt: tokens each sample began with, which ratios count from.
    marks: tensors [B, KV, N] by name that the method leaves at a layer; they follow the entries from step to step, new
    entries bring zeros. memory: what the method leaves for all layers while the cache lives. prefill: whether the cache
    was empty before this pass. ahead: entries at the end that a draft wrote, which never stay. asking [B, M]: queries
    that are no padding, None where all count. attention: what `rows` gives of one token's queries, [B, KV, G, N], where
    it was computed already. visual [B, M]: which of the pass's tokens stand for pictures, None where none was shown.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[], Tensor]],
        *,
        scale: float,
        indices: Tensor,
        prompt: tuple[int, ...],
        seen: int,
        marks: dict[str, Tensor],
        prefill: bool,
        ahead: int = 0,
        asking: Tensor | None = None,
        valid: Tensor | None = None,
        attention: Tensor | None = None,
        visual: Tensor | None = None,
        required: frozenset[str] | None = None,
        **rest: Any,
    ) -> None:
        if required and "received" in required:
            required |= {"queries", "keys"}
        super().__init__(sources, prunable=indices, units=indices.shape[-1], valid=valid, required=required, **rest)
        del self.prunable  # made when it is read
        self.indices, self.scale, self.prompt, self.seen = indices, scale, prompt, seen
        self.marks, self.prefill, self.ahead = marks, prefill, ahead
        self.asking, self._attention, self.visual = asking, attention, visual

    def __getattr__(self, name: str) -> Tensor:
        # Not looked at: what is not finite here is not finite behind the model, where the handle sees it once a pass.
        if name == "prunable":
            value = torch.ones_like(self.indices, dtype=torch.bool) if self.valid is None else self.valid
        elif name.startswith("_") or name not in self._sources or name not in self._required:
            raise AttributeError(f"signal '{name}' was not required at this site; name it in requires()")
        else:
            value = self._sources[name]()
        setattr(self, name, value)
        return value

    def rows(self, last: int) -> Tensor:
        """Causal attention [B, KV, G, W, N] of the last `last` queries, by key-value head and group."""
        if self._attention is not None and last == 1:
            return self._attention.unsqueeze(3)
        queries = self.queries[:, :, -last:]
        if last > queries.shape[2]:
            raise PrunelabError(f"the pass brought {queries.shape[2]} queries, not the {last} whose attention is read")
        return attention.causal_rows(queries, self.keys, self.scale, self.valid_for_rows())

    def accumulated(self, weights: Tensor | None = None) -> Tensor:
        """Attention [B, KV, N] that the entries receive from the pass's queries, weighted by weights [M]; summed over
        the query heads of a group."""
        if self._attention is not None and weights is None:
            return self._attention.sum(2)
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
    fit. The budget counts entries of one head; ratios count from the prompt. What few methods do is said by a mixin.

    when: after the pass that fills the empty cache (`prefill`), after each later one (`decode`), or `both`. alike:
    every layer decides by itself and by one rule, read off queries, keys, values, indices and marks, so that the layers
    of a decoding step may be handed over as samples of one batch. The entries, but for the newest, which is the last of
    the queries', then stand in no order.
    """

    role: ClassVar[str] = "cache_pruner"
    when: ClassVar[Literal["prefill", "decode", "both"]] = "prefill"
    alike: ClassVar[bool] = False

    @abstractmethod
    def requires(self, site: Site) -> frozenset[str]:
        """Names of the signals read at a layer."""

    def misfit(self, info: ModelInfo) -> str | None:
        """Why the method cannot work on a decoder of these sizes; None where it can. Asked before any work."""
        return None

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        """Importance [B, KV, N] of every cache entry, larger is better."""
        raise TypeError(f"{type(self).__name__} fills in neither score() nor plan()")

    def protected(self, capacity: int) -> tuple[int, int]:
        """How many of the first and of the last tokens always stay, where a head keeps `capacity` entries."""
        return 0, 0

    def plan(self, site: Site, signals: CacheSignals, budget: Budget) -> Plan:
        """Entries that stay, [B, KV, K] in original order."""
        return Plan(self.select(self.score(site, signals), signals, budget))

    def capacity(self, budget: Budget, prompt: tuple[int, ...]) -> list[int]:
        """Entries a head of each sample may keep, by the tokens it began with; the whole of the prompt stands for no
        limit."""
        whole = budget.amounts == ((0,) if budget.unit == "removed" else (1,)) and budget.unit != "count"
        if whole or budget.unit == "count":
            return [1 << 30 if whole else int(budget.amounts[0])] * len(prompt)
        return [budget.count(n) for n in prompt]

    def select(self, scores: Tensor, signals: CacheSignals, budget: Budget) -> Gather:
        """The protected and the best-scored entries of each head under the budget, in original order."""
        if signals.valid is None and len(set(signals.prompt)) == 1:
            (count,) = self.capacity(budget, signals.prompt[:1])
            return self._evenly(scores, signals, count, *self.protected(count))
        counts = self.capacity(budget, signals.prompt)
        ends = [self.protected(n) for n in counts]
        limits = torch.tensor(counts, device=scores.device).unsqueeze(1)
        available = signals.prunable.sum(-1)  # [B, KV]
        sink, window = (torch.tensor(part, device=scores.device).view(-1, 1, 1) for part in zip(*ends))
        least = (sink + window).squeeze(-1)
        if bool(((limits < available) & (limits < least)).any()):
            raise self._too_small(min(counts), max(map(sum, ends)))
        newest = signals.indices.masked_fill(~signals.prunable, -1).amax(-1, keepdim=True)
        kept = (signals.indices < sink) | (signals.indices > newest - window)
        ranked = scores.float().masked_fill(kept, float("inf")).masked_fill(~signals.prunable, float("-inf"))
        best = selection.keep_first(selection.descending(ranked).flatten(0, 1), limits.clamp(max=available).flatten())
        shape = (*scores.shape[:2], -1)
        return Gather(best.index.view(shape), None if best.valid is None else best.valid.view(shape))

    def _evenly(self, scores: Tensor, signals: CacheSignals, count: int, sink: int, window: int) -> Gather:
        """The same where all entries of all samples count and equally many stay: nothing depends on a value, so that
        none is looked at."""
        entries = scores.shape[-1]
        if count >= entries:
            return Gather(torch.arange(entries, device=scores.device).expand_as(scores))
        if count < sink + window:
            raise self._too_small(count, sink + window)
        ranked = scores.float()
        if window:
            ranked = ranked.masked_fill(signals.indices >= signals.seen - window, float("inf"))
        if sink:
            ranked = ranked.masked_fill(signals.indices < sink, float("inf"))
        if entries - count == 1:  # the latest of the worst of each head leaves, for which nothing needs sorting
            better = ranked > ranked.amin(-1, keepdim=True)
            return AllButOne(signals.indices.masked_fill(better, -1).argmax(-1, keepdim=True), entries)
        return Gather(selection.descending(ranked)[..., :count].sort(-1).values)

    def _too_small(self, count: int, least: int) -> PrunelabError:
        return PrunelabError(
            f"a cache of {count} entries cannot hold the {least} first and last tokens that {self.name} always keeps;"
            " raise the budget or lower its sink or window"
        )

    def beside(self, other: Method) -> str | None:
        if other.role == "draft_decoder" and self.when != "prefill":
            return f"a draft is confirmed or taken back, but {self.name} prunes for good at every step; let one go"
        return None


class ThinsVectors(CachePruner):
    """Prunes single numbers of keys and values. What changes no more is stored as bitmaps and nonzero numbers: while
    single tokens are written (`resting`) once the cache rests, else behind every pass.

    Its layers are handed over together, as those of methods that are `alike`, where no sample is padded.
    """

    resting: bool

    def plan(self, site: Site, signals: CacheSignals, budget: Budget) -> Plan:
        """Every entry stays."""
        return Plan(Gather(torch.arange(signals.units, device=signals.indices.device).expand_as(signals.indices)))

    @abstractmethod
    def thin(
        self, site: Site, keys: Tensor, values: Tensor, added: int, budget: Budget, signals: CacheSignals | None = None
    ) -> None:
        """Put zeros in place of what is pruned of keys and values [B, KV, N, d], to which a pass just added some.
        signals: what was required of the pass; None behind a single token of a cache that rests."""

    @abstractmethod
    def frozen(self, entries: int) -> int:
        """How many of the first of so many entries `thin` will never change again."""


class Merges(CachePruner):
    """Lets what stays take in what goes."""

    @abstractmethod
    def merge(self, signals: CacheSignals, kept: Gather) -> tuple[Tensor, Tensor]:
        """Keys and values [B, KV, K, d] of the entries that are kept."""


class OwnAttention(CachePruner):
    """Changes attention itself."""

    @abstractmethod
    def attend(self, site: Site, signals: CacheSignals, budget: Budget) -> Tensor | None:
        """The heads' outputs [B, H, M, d]; None leaves them to the model."""


class Cascades(OwnAttention):
    """Adds up what tokens are worth from layer to layer and step to step; what one layer lets go is gone for all later
    ones. Where every layer holds as much, a decoding step is then decided once, behind its first layer."""

    @abstractmethod
    def cascades(self) -> bool:
        """Whether `step` says all of a step under these options."""

    @abstractmethod
    def step(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The heads' outputs [B, H, 1, d] of one token's queries on entries [B, KV, N, d], and the worth [B, N] that
        these add to the entries' tokens."""


class _ReadsPrompt(CachePruner):
    def beside(self, other: Method) -> str | None:
        if other.role == "token_pruner":
            return f"{self.name} chooses what is read of the prompt before {other.name} sees it; let one go"
        return super().beside(other)


class ReadsAhead(_ReadsPrompt):
    """Lets the target read what may follow the prompt, for its queries alone."""

    @abstractmethod
    def lookahead(self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]) -> Tensor:
        """Tokens [B, A] that may follow the prompt [B, N]."""


class ShortensPrompt(_ReadsPrompt):
    """Leaves tokens of the prompt unread."""

    @abstractmethod
    def shorten(
        self, tokens: Tensor, valid: Tensor | None, budget: Budget, services: Mapping[str, Any]
    ) -> Tensor | None:
        """Places [B, K] of the prompt tokens [B, N] that the target reads at all, closed up; None: all."""

    def beside(self, other: Method) -> str | None:
        if other.role == "draft_decoder":
            return f"{self.name} renumbers the prompt that {other.name} drafts behind; let one go"
        return super().beside(other)
