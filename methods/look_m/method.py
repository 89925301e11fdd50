"""LOOK-M (Wan et al., Findings of EMNLP 2024): of a prompt with pictures the text's cache entries stay, and those of
the pictures that leave are merged into what stays.

As released: text stays whole, whatever the budget; the last entries stay; of the pictures' others those that were
attended to most, as far as the budget reaches. Each that goes is added to the entry that stays whose key is most like
its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import Share
from prunelab.common.core.plan import Gather, Plan, Site, take
from prunelab.common.kv_cache.role import CacheSignals, Merges

Strategy = Literal["pivot", "average", "none"]


def text_first(received: Tensor, text: Tensor, last: Tensor, valid: Tensor, counts: list[int]) -> Gather:
    """The `counts` entries that stay of each sample, in their order: text and the last ones, marked in [B, N], then
    those that received most attention [B, KV, N]."""
    ranked = received.float().masked_fill((text | last).unsqueeze(1), float("inf"))
    order = selection.descending(ranked.masked_fill(~valid.unsqueeze(1), float("-inf")))[..., : max(counts)]
    if len(set(counts)) == 1:
        return Gather(order.sort(-1).values)
    limits = torch.tensor(counts, device=order.device)[:, None, None]
    real = torch.arange(order.shape[-1], device=order.device) < limits
    index = order.masked_fill(~real, received.shape[-1]).sort(-1).values
    real = real.expand_as(index)
    return Gather(index.masked_fill(~real, 0), real)


def nearest(keys: Tensor, kept: Gather) -> Tensor:
    """The place [B, KV, N] of each entry among the kept ones: of the key that is most like its own, by the cosine."""
    unit = F.normalize(keys.float(), dim=-1)
    likeness = unit @ take(unit, kept.index).transpose(-1, -2)
    if kept.valid is not None:
        likeness = likeness.masked_fill(~kept.valid.unsqueeze(2), float("-inf"))
    return likeness.argmax(-1)


def merged(x: Tensor, kept: Gather, gone: Tensor, place: Tensor, strategy: Strategy) -> Tensor:
    """Keys or values [B, KV, K, d] of what stays: the mean of an entry's own and of what those of x [B, KV, N, d] bring
    that are `gone` [B, KV, N] to its place. `pivot`: half of their own and half of the entry's; `average`: their own.
    """
    own, brought = take(x, kept.index).float(), x.float()
    at = place.unsqueeze(-1).expand_as(brought)
    if strategy == "pivot":
        brought = (brought + own.gather(2, at)) / 2
    share = gone.to(own.dtype)
    total = own.scatter_add(2, at, brought * share.unsqueeze(-1))
    count = torch.ones_like(own[..., 0]).scatter_add(2, place, share)
    return (total / count.unsqueeze(-1)).to(x.dtype)


@dataclass(frozen=True)
class LookM(Merges):
    """Text first, and pictures merged, behind the prompt (arXiv 2406.18139).

    Parameters
    ----------
    recent : float
        Share of the budget that the last entries get.
    strategy : {"pivot", "average", "none"}
        How what stays takes in what goes.
    text : bool
        Whether text stays before pictures, also above the budget. A prompt without pictures is pruned as if all of it
        were one.  # assumption: the authors' code leaves such prompts alone
    """

    recent: Share = 0.5
    strategy: Strategy = "pivot"
    text: bool = True

    name: ClassVar[str] = "look_m"

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys", "values", "received"})

    def plan(self, site: Site, signals: CacheSignals, budget: Budget) -> Plan:
        whole = [min(count, n) for count, n in zip(self.capacity(budget, signals.prompt), signals.prompt, strict=True)]
        if whole == list(signals.prompt):
            return Plan(Gather(torch.arange(signals.units, device=signals.indices.device).expand_as(signals.indices)))
        last = [int(round(self.recent * count, 6)) for count in whole]
        valid = signals.prunable[:, 0]
        behind = valid.flip(-1).cumsum(-1).flip(-1)  # entries from here to the end
        newest = valid & (behind <= torch.tensor(last, device=valid.device).unsqueeze(1))
        text = torch.zeros_like(valid)
        if self.text and signals.visual is not None:
            text = valid & ~newest & ~signals.visual & signals.visual.any(1, keepdim=True)
        known = signals.memory.setdefault("texts", {})  # one look a prompt, not one a layer
        if tuple(last) not in known:
            known[tuple(last)] = text.sum(1).tolist()
        counts = [max(count, end + held) for count, end, held in zip(whole, last, known[tuple(last)], strict=True)]
        return Plan(text_first(signals.received, text, newest, valid, counts))

    def merge(self, signals: CacheSignals, kept: Gather) -> tuple[Tensor, Tensor]:
        keys, values = signals.keys, signals.values
        if self.strategy == "none" or kept.outputs == signals.units:
            return kept.apply(keys), kept.apply(values)
        flags = torch.ones_like(kept.index) if kept.valid is None else kept.valid.long()
        gone = signals.prunable & (torch.zeros_like(signals.indices).scatter_add(2, kept.index, flags) == 0)
        place = nearest(keys, kept)
        return merged(keys, kept, gone, place, self.strategy), merged(values, kept, gone, place, self.strategy)
