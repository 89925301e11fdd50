"""SpAtten (Wang, Zhang and Han, HPCA 2021): cascade pruning of tokens and heads, local value pruning, and keys that are
fetched in two parts.

Tokens that attention passes by, and heads that add little, are pruned once and for all later layers: their importance
adds up from layer to layer and from step to step. The authors published no code of this; their later variant for
chats, which is another method, is `SpAttenChat`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import attention, selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveShare, Share
from prunelab.common.core.plan import Plan, Site
from prunelab.common.kv_cache.role import CachePruner, CacheSignals, Cascades

ROWS = 128  # queries attended at once


def quantised(x: Tensor, msb: int, lsb: int = 0) -> Tensor:
    """x as its `msb` leading bits of a linear symmetric quantisation to msb + lsb bits, one scale for each vector."""
    # assumption: one scale for each vector [..., d]; the paper quantises linearly and names no granularity
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (2 ** (msb + lsb - 1) - 1)
    return ((x / scale).round() / 2**lsb).floor() * 2**lsb * scale


def local_values(probabilities: Tensor, share: float) -> Tensor:
    """Probabilities [..., N] of which only the largest, the `share` of the keys that a query sees, fetch their values;
    they are not scaled up."""
    if share >= 1:
        return probabilities
    seen = (probabilities > 0).sum(-1, keepdim=True)
    kept = (share * seen + 1e-6).long().clamp_min(1)
    most = max(1, int(share * probabilities.shape[-1] + 1e-6))
    least = probabilities.topk(most, -1).values.gather(-1, kept - 1)
    return probabilities.masked_fill(probabilities < least, 0)


def fetched(
    tokens: float, heads: float, values: float, refetched: float, msb: int, lsb: int, full: int = 16
) -> dict[str, float]:
    """DRAM traffic of keys and values as a share of the dense one, from what is left on average: shares of tokens and
    heads, of values fetched for a query, and of queries that fetched the keys' second part, at `full` bits before.

    Keys cost their leading bits always and the others for the share refetched; values all their bits (section 3.4).
    """
    keys = tokens * heads * (msb + refetched * lsb) / full
    fetched_values = tokens * heads * values * (msb + lsb) / full
    return {"keys": keys, "values": fetched_values, "total": (keys + fetched_values) / 2}


@dataclass(frozen=True)
class SpAtten(Cascades):
    """Cascade pruning while a prompt is read and an answer written (HPCA 2021, arXiv 2012.09852).

    The budget is what stays of the tokens behind each layer: one amount for all, or falling amounts, one a layer. Heads
    go by the size of their outputs, anew for every pass.

    Parameters
    ----------
    heads : float
        Share of the heads that stays behind each layer.
    values : float
        Share of the values that a query fetches.
    msb, lsb : int
        Bits of keys (and values) in two parts, 0 for plain numbers.
    threshold : float
        Where a query's largest probability is below it the second part is fetched too.
    """

    heads: PositiveShare = 1.0
    values: PositiveShare = 1.0
    msb: NonNegativeInt = 0
    lsb: NonNegativeInt = 4
    threshold: NonNegativeFloat = 0.1

    name: ClassVar[str] = "spatten"
    when = "both"

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys", "values"})

    def protected(self, capacity: int) -> tuple[int, int]:
        return 0, min(1, capacity)  # assumption: the newest token stays, since the next one is read off it

    def attend(self, site: Site, signals: CacheSignals, budget: Budget) -> Tensor | None:
        queries, new = signals.queries, signals.queries.shape[2]
        indices, carry = signals.indices, signals.memory
        batch, heads = queries.shape[:2]
        tokens = signals.seen
        if site.layer == 0:  # a new pass: the cascade starts again, importance goes on
            there = torch.zeros(batch, tokens, dtype=torch.long, device=indices.device)
            carry["tokens"] = there.scatter_add(1, indices[:, 0], signals.prunable[:, 0].long()).bool()
            carry["heads"] = torch.ones(batch, heads, dtype=torch.bool, device=indices.device)
            before = carry.get("importance", torch.zeros(batch, 0, device=indices.device))
            carry["importance"] = torch.nn.functional.pad(before, (0, tokens - before.shape[1]))
            carry.setdefault("head_importance", torch.zeros(batch, heads, device=indices.device))
        alive = carry["tokens"].gather(1, indices[:, 0]).unsqueeze(1) & signals.prunable  # [B, KV, N]
        asking = alive[:, 0, -new:]
        output, received, carry["refetched"] = self._attend(signals, alive, asking)
        carry["importance"] = carry["importance"].scatter_add(1, indices[:, 0], received * alive[:, 0])
        if self.heads < 1:
            output = output * carry["heads"][:, :, None, None]
            size = (output.abs() * asking[:, None, :, None]).sum((2, 3))
            carry["head_importance"] = carry["head_importance"] + size
        return output

    def cascades(self) -> bool:
        return self.heads == 1 and not self.msb

    def step(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        row = attention.causal_rows(queries, keys, scale).squeeze(3)  # [B, KV, G, N]
        fetched = local_values(row, self.values).to(values.dtype).flatten(0, 1)
        output = torch.bmm(fetched, values.flatten(0, 1))  # [B KV, G, d]
        return output.view(*queries.shape[:3], -1), row.sum((1, 2))

    def _attend(self, signals: CacheSignals, alive: Tensor, asking: Tensor) -> tuple[Tensor, Tensor, float]:
        """Outputs [B, H, M, d], attention [B, N] received over the heads at work, and the share of queries whose keys
        were fetched whole; a block of queries at a time."""
        queries, keys, values = signals.queries, signals.keys, signals.values
        new, total = queries.shape[2], keys.shape[2]
        working = attention.grouped(signals.memory["heads"], keys.shape[1])  # [B, KV, G]
        weight = working[..., None].float() * asking[:, None, None]  # [B, KV, G, M]
        short = quantised(keys, self.msb, self.lsb) if self.msb else keys
        whole = quantised(keys, self.msb + self.lsb) if self.msb else keys
        values = quantised(values, self.msb + self.lsb) if self.msb else values
        received, outputs, again, rows = torch.zeros(len(keys), total, device=keys.device), [], 0, 0
        for start in range(0, new, ROWS):
            part = slice(start, start + ROWS)
            offset = total - new + start
            row = attention.causal_rows(queries[:, :, part], short, signals.scale, alive, offset)
            if self.msb:
                unsure = row.amax(-1, keepdim=True) < self.threshold
                exact = attention.causal_rows(queries[:, :, part], whole, signals.scale, alive, offset)
                row = torch.where(unsure, exact, row)
                again, rows = again + int(unsure.sum()), rows + unsure.numel()
            received += (row * weight[..., part, None]).sum((1, 2, 3))
            outputs.append((local_values(row, self.values).to(values.dtype) @ values.unsqueeze(2)).flatten(1, 2))
        return torch.cat(outputs, 2), received, again / rows if rows else 0.0

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        """Cumulative importance [B, KV, N] of the tokens; what an earlier layer pruned is out."""
        importance = signals.memory["importance"].gather(1, signals.indices[:, 0])
        importance = importance.masked_fill(~signals.memory["tokens"].gather(1, signals.indices[:, 0]), -1)
        return importance.unsqueeze(1).expand_as(signals.prunable)

    def plan(self, site: Site, signals: CacheSignals, budget: Budget) -> Plan:
        kept = self.select(self.score(site, signals), signals, budget)
        stays = kept.apply(signals.indices)[:, 0]
        counts = torch.ones_like(stays, dtype=torch.bool) if kept.valid is None else kept.valid[:, 0]
        carry = signals.memory
        left = torch.zeros(*carry["tokens"].shape, dtype=torch.long, device=stays.device)
        carry["tokens"] = carry["tokens"] & left.scatter_add(1, stays, counts.long()).bool()
        if self.heads < 1:
            heads = carry["head_importance"].masked_fill(~carry["heads"], -1)
            best, _ = selection.top_k(heads, math.ceil(round(self.heads * heads.shape[1], 6)))
            carry["heads"] = carry["heads"] & torch.zeros_like(carry["heads"]).scatter(1, best, True)
        return Plan(kept)


def chat_positions(logits: Tensor, start: int, important: int, recent: int, coming: int) -> Tensor:
    """Positions [..., K] that stay in a chat's cache before a turn of `coming` tokens, from the scaled logits
    [..., M, L] of the last pass, with neither mask nor softmax; all of them where the turn still fits.

    The first `start` stay, the `important` ones between, and the last, of which as many leave as there are coming.
    """
    total = logits.shape[-1]
    if total + coming <= start + important + recent:
        return torch.arange(total, device=logits.device).expand(*logits.shape[:-2], -1)
    end = min(total - recent + coming, total)
    if end - start < important:
        raise PrunelabError(f"spatten: {important} important tokens are asked for where only {end - start} can go")
    best, _ = selection.top_k(logits.sum(-2)[..., start:end], important)
    first, last = (torch.arange(*ends, device=logits.device) for ends in ((0, start), (end, total)))
    lead = logits.shape[:-2]
    return torch.cat([first.expand(*lead, -1), start + best, last.expand(*lead, -1)], -1)


@dataclass(frozen=True)
class SpAttenChat(CachePruner):
    """The authors' released variant for chats (beside arXiv 2012.09852): logits instead of probabilities, of the last
    pass alone, head by head.

    Parameters
    ----------
    start : int
        First tokens that stay.
    recent : float
        Share of the budget that the last tokens get.
    """

    start: NonNegativeInt = 4
    recent: Share = 0.5

    name: ClassVar[str] = "spatten_chat"
    when = "both"
    alike = True

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries", "keys"})

    def protected(self, capacity: int) -> tuple[int, int]:
        return self.start, int(round(self.recent * capacity, 6))

    def score(self, site: Site, signals: CacheSignals) -> Tensor:
        # assumption: heads that share an entry add up; the released code has no grouped queries
        queries = signals.queries if signals.asking is None else signals.queries * signals.asking[:, None, :, None]
        summed = signals.scale * attention.grouped(queries.sum(2), signals.keys.shape[1]).sum(2)
        logits = torch.bmm(signals.keys.flatten(0, 1), summed.flatten(0, 1).unsqueeze(-1))  # their sum is one product
        return logits.view(signals.keys.shape[:3])
