"""The field's selection and merging steps as pure batched tensor functions, under their standard names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import PrunelabError
from common.types import Budget, Gather, Mix


def descending(scores: Tensor) -> Tensor:
    """Positions [..., N] from the best score to the worst; equal scores keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, None]:
    """The k best positions [..., K] of scores [..., N], in ascending order; ties go to the earlier position."""
    return descending(scores)[..., :k].sort(-1).values, None


def top_k_units(scores: Tensor, prunable: Tensor, units: int, budget: Budget, valid: Tensor | None = None) -> Gather:
    """The best prunable units under the budget, and every protected one, in original order.

    scores and prunable [B, N]; `units` of them are prunable in each sample, except where `valid` [B, N] marks
    padding: then each sample's budget counts its own units, and the result carries a validity mask.
    """
    total = scores.shape[1]
    ranked = scores.float().masked_fill(~prunable, float("inf"))
    if valid is None:
        index, _ = top_k(ranked, total - units + budget.count(units))
        return Gather(index)
    ranked = ranked.masked_fill(~valid, float("-inf"))
    available = (prunable & valid).sum(1)
    kept = torch.tensor([budget.count(n) for n in available.tolist()], device=scores.device)
    kept = kept + (valid & ~prunable).sum(1)
    return keep_first(descending(ranked), kept)


def keep_first(order: Tensor, counts: Tensor) -> Gather:
    """The first `counts` [B] entries of each row of `order` [B, N], ascending, padded to the largest count."""
    outputs = int(counts.max())
    rank = torch.arange(outputs, device=order.device)
    chosen = order[:, :outputs].masked_fill(rank >= counts[:, None], order.shape[1]).sort(-1).values
    valid = chosen < order.shape[1]
    return Gather(chosen.masked_fill(~valid, 0), None if bool(valid.all()) else valid)


def compact(kept: Tensor) -> Gather:
    """The True places of a mask [B, N] as a Gather, padded to the largest count among samples."""
    return keep_first((~kept).int().argsort(dim=-1, stable=True), kept.sum(-1))


@dataclass(frozen=True)
class Matching:
    """A bipartite matching of N tokens: slot [B, N] is the output each token goes to, of `outputs` in all."""

    slot: Tensor
    outputs: int

    def total(self, sizes: Tensor) -> Tensor:
        """Sizes [B, N] of the tokens -> sizes [B, K] of the outputs."""
        return sizes.new_zeros(sizes.shape[0], self.outputs).scatter_add(1, self.slot, sizes)

    def mix(self, sizes: Tensor) -> Mix:
        """The size-weighted mean of what shares a slot."""
        weight = sizes / self.total(sizes).gather(1, self.slot)
        source = torch.arange(sizes.shape[1], device=sizes.device).expand_as(self.slot)
        return Mix(self.slot, source, weight, self.outputs)


def bipartite_matching(
    metric: Tensor, removed: int, *, class_token: bool = False, distill_token: bool = False
) -> Matching:
    """Bipartite soft matching (ToMe, section 3): the `removed` tokens at even places that are most similar to a
    token at an odd place are sent to it.

    metric [B, N, d], compared by cosine. Outputs are the remaining even tokens, then the odd ones; with a
    distillation token its slot moves to position 1. At most half of the unprotected tokens can go.
    """
    batch, total, _ = metric.shape
    removed = max(0, min(removed, (total - class_token - distill_token) // 2))
    if removed == 0:
        return Matching(torch.arange(total, device=metric.device).expand(batch, -1), total)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # [B, ceil(N/2), floor(N/2)]
    if class_token:
        similarity[:, 0] = float("-inf")
    if distill_token:
        similarity[:, :, 0] = float("-inf")
    best, partner = similarity.max(-1)  # [B, ceil(N/2)]
    order = descending(best)
    gone, stays = order[:, :removed], order[:, removed:]
    if class_token:
        stays = stays.sort(-1).values  # keeps the class token first
    unmerged, odd = stays.shape[1], total // 2

    even_slot = torch.zeros_like(order)
    even_slot = even_slot.scatter(1, stays, torch.arange(unmerged, device=metric.device).expand_as(stays))
    even_slot = even_slot.scatter(1, gone, unmerged + partner.gather(1, gone))
    odd_slot = (unmerged + torch.arange(odd, device=metric.device)).expand(batch, odd)
    slot = even_slot.new_empty(batch, total)
    slot[:, ::2], slot[:, 1::2] = even_slot, odd_slot
    if distill_token:  # [unmerged 0, odd 0, other unmerged, other odd]
        slot = torch.where(slot == unmerged, 1, torch.where((slot >= 1) & (slot < unmerged), slot + 1, slot))
    return Matching(slot, unmerged + odd)


def inverse_transform_sampling(weights: Tensor, quantiles: int, valid: Tensor | None = None) -> Tensor:
    """Mask [B, N] of the units on which evenly spaced quantiles of their own weight distribution fall.

    weights [B, N] are sorted and accumulated; quantiles run evenly from the first step above zero to 1, and each picks
    the unit whose cumulative weight is nearest (ATS, section 3.2, in the released form). Units picked twice count
    once, so at most `quantiles` stay. Where `valid` is False a unit has no weight and is never picked.
    """
    units = weights.shape[1]
    valid = torch.ones_like(weights, dtype=torch.bool) if valid is None else valid
    weights = weights.masked_fill(~valid, 0)
    order = weights.masked_fill(~valid, -1).argsort(dim=-1, stable=True)  # padding first, then ascending weight
    real = valid.gather(1, order)
    total = weights.gather(1, order).cumsum(-1)
    low = total.masked_fill(~real, float("inf")).amin(-1, keepdim=True)
    share = (total - low) / (total[:, -1:] - low).clamp_min(1e-30)
    share = share.masked_fill(~real, -1.0)
    start = share.masked_fill(share <= 0, 1.0).amin(-1, keepdim=True)
    steps = torch.arange(quantiles, device=weights.device, dtype=weights.dtype) / max(quantiles - 1, 1)
    marks = (start + (1 - start) * steps).contiguous()  # [B, Q]
    right = torch.searchsorted(share.contiguous(), marks).clamp(max=units - 1)
    left = (right - 1).clamp_min(0)
    nearer = marks - share.gather(1, left) <= share.gather(1, right) - marks
    picked = order.gather(1, torch.where(nearer, left, right))
    return torch.zeros_like(valid).scatter(1, picked, True) & valid


def power_iteration(
    step: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float | None = None
) -> Tensor:
    """Apply `step` until the L2 change is at most `tolerance`, or `iterations` times where that is None."""
    state = start
    for _ in range(iterations):
        state, previous = step(state), state
        if tolerance is not None and float((state - previous).norm()) <= tolerance:
            break
    return state


def min_max(values: Tensor) -> Tensor:
    """Values [n] scaled linearly so that the largest is 1 and the smallest 0; all 1 where they are equal."""
    low, high = values.min(), values.max()
    return torch.ones_like(values) if bool(high == low) else (values - low) / (high - low)


def leading(document: Sequence[int], position: Sequence[int]) -> Tensor:
    """MEAD's Position feature [n]: 1 for the first sentence of a document, 0 for its last, linear in between."""
    last: dict[int, int] = {}
    for d, p in zip(document, position, strict=True):
        last[d] = max(last.get(d, 0), p)
    return torch.tensor([1 - p / max(last[d], 1) for d, p in zip(document, position, strict=True)], dtype=torch.float64)


def text_sizes(sentences: Sequence[str], unit: str) -> list[int]:
    """What each sentence takes of a budget: 1 (`count`, `ratio`), its `words`, or its UTF-8 `bytes` and a newline."""
    if unit == "words":
        return [len(s.split()) for s in sentences]
    if unit == "bytes":
        return [len(s.encode()) + 1 for s in sentences]
    return [1] * len(sentences)


def fill(
    order: Sequence[int],
    sizes: Sequence[int],
    budget: Budget,
    redundant: Callable[[int, list[int]], bool] | None = None,
) -> list[int]:
    """Take units in `order` while the budget lasts, skipping those that are `redundant` given the ones taken.

    A unit that no longer fits ends the summary, except that the first one is always taken, so that a budget
    in words or bytes never gives an empty text; cutting to length is left to the metric, as in ROUGE. The newline
    behind the last sentence is not counted: the sentences joined by newlines have at most that many bytes.
    """
    if len(budget.amounts) != 1:
        raise PrunelabError("a summary has one budget; give a single amount")
    if budget.unit in ("words", "bytes"):
        limit = float(budget.amounts[0]) + (budget.unit == "bytes" and budget.amounts[0] > 0)
    elif budget.unit in ("ratio", "count", "removed"):
        limit = float(budget.count(len(sizes)))
    else:
        raise PrunelabError(f"text cannot be budgeted in {budget.unit}; use ratio, count, words or bytes")
    taken: list[int] = []
    used = 0
    for unit in order:
        if used >= limit:
            break
        if redundant is not None and redundant(unit, taken):
            continue
        if taken and used + sizes[unit] > limit:
            break
        taken.append(unit)
        used += sizes[unit]
    return taken
