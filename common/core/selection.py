"""The field's selection and merging steps as pure batched tensor functions, under their standard names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, Mix, take

MANY = 2048  # scores, from which on a partial sort of longer keys is faster than a whole one


def descending(scores: Tensor) -> Tensor:
    """Positions [..., N] from the best score to the worst; equal scores keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, None]:
    """The k best positions [..., K] of scores [..., N], in ascending order; ties go to the earlier position.

    Of many float32 scores the best are picked by whole numbers that no two positions share, which needs no sort of
    all: the scores' bits in their order, and below them the position."""
    if scores.numel() < MANY or scores.dtype != torch.float32 or scores.device.type == "meta":
        return descending(scores)[..., :k].sort(-1).values, None
    bits = (scores.detach() + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    earlier = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    best = (ordered | earlier).topk(min(k, scores.shape[-1]), dim=-1, sorted=False).indices
    return best.sort(-1).values, None


def top_k_of_parts(scores: Tensor, parts: int, k: int) -> Tensor:
    """Ascending positions [B, parts * K] of the k best of each part, for scores [B, parts * N] that hold one part after
    the other: every crop of a large image, or frame of a video, keeps as many."""
    chosen, _ = top_k(scores.unflatten(1, (parts, -1)), k)  # [B, parts, K]
    start = torch.arange(parts, device=scores.device).unsqueeze(1) * (scores.shape[1] // parts)
    return (chosen + start).flatten(1)


def top_k_units(
    scores: Tensor, prunable: Tensor, units: int, budget: Budget | Sequence[int], valid: Tensor | None = None
) -> Gather:
    """The best prunable units under the budget, and every protected one, in original order.

    scores and prunable [B, N]; `units` of them are prunable in each sample, except where `valid` [B, N] marks
    padding: then each sample's budget counts its own units, and the result carries a validity mask. In place of a
    budget, how many units stay of each sample, all as many where nothing is padded.
    """
    total = scores.shape[1]
    ranked = scores.float().masked_fill(~prunable, float("inf"))
    if valid is None:
        stay = budget.count(units) if isinstance(budget, Budget) else min(budget[0], units)
        index, _ = top_k(ranked, total - units + stay)
        return Gather(index)
    ranked = ranked.masked_fill(~valid, float("-inf"))
    available = (prunable & valid).sum(1)
    if isinstance(budget, Budget):
        budget = [budget.count(n) for n in available.tolist()]
    kept = torch.tensor(budget, device=scores.device).minimum(available) + (valid & ~prunable).sum(1)
    return keep_first(descending(ranked), kept)


def keep_first(order: Tensor, counts: Tensor) -> Gather:
    """The first `counts` [B] entries of each row of `order` [B, N], ascending, padded to the largest count."""
    fewest, outputs = torch.stack(counts.aminmax()).tolist()  # one look for both
    rank = torch.arange(outputs, device=order.device)
    chosen = order[:, :outputs].masked_fill(rank >= counts[:, None], order.shape[1]).sort(-1).values
    valid = chosen < order.shape[1]
    return Gather(chosen.masked_fill(~valid, 0), None if fewest == outputs else valid)


def compact(kept: Tensor) -> Gather:
    """The True places of a mask [B, N] as a Gather, padded to the largest count among samples."""
    if len(kept) == 1:
        return Gather(kept.nonzero()[:, 1].unsqueeze(0))
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


def scaled_distance(tokens: Tensor) -> Tensor:
    """Euclidean distance of every pair of tokens [B, N, D], over the square root of D: [B, N, N]."""
    return torch.cdist(tokens, tokens) / tokens.shape[-1] ** 0.5


def cosine_distance(tokens: Tensor) -> Tensor:
    """One minus the cosine of every pair of tokens [B, M, D]: [B, M, M]. Of two tokens one product serves both ways."""
    unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(tokens.dtype).tiny)
    batch, count, _ = unit.shape
    size = max(128, -(-count // 8))
    if count <= size or unit.requires_grad:
        return 1 - unit @ unit.transpose(1, 2)
    out = unit.new_empty(batch, count, count)
    for start in range(0, count, size):
        stop = min(start + size, count)
        part = 1 - unit[:, start:stop] @ unit[:, start:].transpose(1, 2)
        out[:, start:stop, start:] = part
        out[:, stop:, start:stop] = part[:, :, stop - start :].transpose(1, 2)
    return out


def max_min_order(distance: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    """The first `count` tokens [B, count] in the order in which the greedy algorithm picks them.

    distance [B, M, M] is symmetric; `real` [B, M] is False at padding, which is picked last. First comes the token
    whose nearest neighbour is farthest, then, each time, the one farthest from all picked before. The distance to the
    nearest picked token only falls, so one running minimum [B, M] takes the place of a search among all pairs. Ties go
    to the earlier token.
    """
    tokens = distance.shape[-1]
    if count == 0:
        return torch.zeros(len(distance), 0, dtype=torch.long, device=distance.device)
    if real is not None:
        distance = distance.masked_fill(~real.unsqueeze(1), float("inf"))  # padding is nobody's neighbour
    own = min(1, tokens - 1)  # the smallest distance is a token's own, unless there is no other
    nearest = distance.topk(own + 1, dim=-1, largest=False).values[..., own]
    apart = torch.full_like(nearest, float("inf"))  # [B, M] distance to the nearest pick
    if real is not None:
        nearest, apart = (t.masked_fill(~real, float("-inf")) for t in (nearest, apart))
    picks = [nearest.argmax(-1, keepdim=True)]
    rows = torch.arange(len(distance), device=distance.device)
    for _ in range(count - 1):
        last = picks[-1]
        apart = torch.minimum(apart, distance[rows, last.squeeze(-1)])
        apart.scatter_(-1, last, float("-inf"))
        picks.append(apart.argmax(-1, keepdim=True))
    return torch.cat(picks, -1)


def peak_scores(distance: Tensor, neighbours: int, noise: Tensor | None = None) -> Tensor:
    """DPC-KNN: how much each token [B, N] is a centre, dense and far from any denser one.

    distance [B, N, N]. A token's density is exp(-mean squared distance to its nearest neighbours, itself included);
    `noise` [B, N] is added to part equal ones. Its score is the density times the distance to the nearest strictly
    denser token; the densest takes the sample's largest distance there.
    """
    near = distance.topk(neighbours, dim=-1, largest=False).values
    density = (-near.square().mean(-1)).exp()
    if noise is not None:
        density = density + noise
    denser = density.unsqueeze(1) > density.unsqueeze(2)  # [B, N, N]
    farthest = distance.flatten(1).amax(1)[:, None, None]
    return torch.where(denser, distance, farthest).amin(-1) * density


def density_peaks(distance: Tensor, clusters: int, neighbours: int, noise: Tensor | None = None) -> Tensor:
    """The `clusters` tokens [B, C], best first, with the largest `peak_scores`; there are at most as many
    neighbours."""
    return descending(peak_scores(distance, min(neighbours, clusters), noise))[:, :clusters]


@dataclass(frozen=True)
class Clustering:
    """N tokens in C clusters, each around one of them: slot [B, N] is every token's cluster, centres [B, C] the token
    in its middle."""

    slot: Tensor
    centres: Tensor

    def mix(self, centre_share: float | None = None) -> Mix:
        """One token a cluster: the mean of its tokens, or `centre_share` of the centre and the rest of the mean of the
        others. A centre alone stays as it is."""
        others = torch.ones_like(self.slot, dtype=torch.float32).scatter(1, self.centres, 0.0)
        count = others.new_zeros(self.centres.shape).scatter_add(1, self.slot, others).gather(1, self.slot)
        if centre_share is None:
            weight = 1 / (count + 1)
        else:
            centre = torch.where(count > 0, centre_share, 1.0)
            weight = torch.where(others > 0, (1 - centre_share) / count.clamp_min(1), centre)
        source = torch.arange(self.slot.shape[1], device=self.slot.device).expand_as(self.slot)
        return Mix(self.slot, source, weight, self.centres.shape[1])


def cluster(distance: Tensor, centres: Tensor, ascending: bool = True) -> Clustering:
    """Every token joins its nearest centre, for distance [B, N, N] and centres [B, C]; of equally near ones the first.
    Clusters come in the order of their centres in the sequence, or as the centres are given."""
    centres = centres.sort(-1).values if ascending else centres
    slot = take(distance.transpose(1, 2), centres).argmin(1)  # distances [B, C, N] to each centre
    own = torch.arange(centres.shape[1], device=centres.device).expand_as(centres)
    return Clustering(slot.scatter(1, centres, own), centres)  # a centre is its own, also beside its double


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


def identity(batch: int, units: int, device: torch.device | None = None) -> Mix:
    """The mixture that leaves `units` units as they are."""
    every = torch.arange(units, device=device).expand(batch, -1)
    return Mix(every, every, torch.ones(batch, units, device=device), units)


def chained(first: Mix, then: Mix) -> Mix:
    """`first` and after it `then`, as one mixture, where `then` sends every unit to one output (a merge does): its
    entry e is unit e."""
    weight = first.weight * then.weight.gather(1, first.target)
    return Mix(then.target.gather(1, first.target), first.source, weight, then.outputs)


def behind(mix: Mix, first: int) -> Mix:
    """The same mixture behind `first` units that stay as they are."""
    kept = identity(len(mix.target), first, mix.target.device)
    target, source = torch.cat([kept.target, mix.target + first], 1), torch.cat([kept.source, mix.source + first], 1)
    valid = None if mix.valid is None else torch.cat([kept.weight > 0, mix.valid], 1)
    return Mix(target, source, torch.cat([kept.weight, mix.weight], 1), first + mix.outputs, valid)


def side_by_side(mixes: Sequence[Mix]) -> Mix:
    """Mixtures of single samples, of different sizes, as one with what does not count behind."""
    outputs, entries = max(mix.outputs for mix in mixes), max(mix.target.shape[1] for mix in mixes)
    target, source, weight = (
        torch.cat([torch.nn.functional.pad(part, (0, entries - part.shape[1])) for part in column])
        for column in zip(*((mix.target, mix.source, mix.weight) for mix in mixes), strict=True)
    )
    counts = torch.tensor([mix.outputs for mix in mixes], device=target.device).unsqueeze(1)
    valid = torch.arange(outputs, device=counts.device) < counts
    return Mix(target, source, weight, outputs, None if len({mix.outputs for mix in mixes}) == 1 else valid)


def of_crops(mix: Mix, crops: int, units: int) -> Mix:
    """Mixtures of the units of single crops [B * crops, units] as one of whole images [B, crops * units], the outputs
    of one crop behind those of the other."""
    number = torch.arange(crops, device=mix.target.device).repeat(len(mix.target) // crops).unsqueeze(1)
    target, source = mix.target + number * mix.outputs, mix.source + number * units
    target, source, weight = (x.unflatten(0, (-1, crops)).flatten(1) for x in (target, source, mix.weight))
    valid = None if mix.valid is None else mix.valid.unflatten(0, (-1, crops)).flatten(1)
    return Mix(target, source, weight, crops * mix.outputs, valid)


def merged(tokens: Tensor, outputs: int, start: Mix | None = None) -> Mix:
    """Rounds of bipartite matching on tokens [B, N, D] until `outputs` (at least 1) are left, each halving at most.

    Every round takes the plain mean of what it matches, however much its tokens stand for already. start: the mixture
    that gave the tokens; the result is then one of its sources.
    """
    whole = identity(tokens.shape[0], tokens.shape[1], tokens.device) if start is None else start
    while whole.outputs > max(outputs, 1):
        matching = bipartite_matching(tokens, whole.outputs - outputs)
        step = matching.mix(torch.ones(tokens.shape[:2], device=tokens.device))
        whole = chained(whole, step)
        if whole.outputs > max(outputs, 1):  # the last round's tokens are made with all others' by the mixture
            tokens = step.apply(tokens)
    return whole


def resized(
    grid: tuple[int, int],
    size: tuple[int, int],
    how: str = "bilinear",
    batch: int = 1,
    device: torch.device | None = None,
) -> Mix:
    """A feature map of `grid` (height, width) brought to `size`, larger or smaller, as a mixture of its units in rows.
    how: `bilinear` interpolation between pixel centres without smoothing, or `average` over bins."""

    def along(before: int, after: int) -> Tensor:  # [after, before] weights on one axis, by resizing every unit alone
        basis = torch.eye(before).unsqueeze(0)
        if how == "average":
            return torch.nn.functional.adaptive_avg_pool1d(basis, after)[0].T
        return torch.nn.functional.interpolate(basis, size=after, mode="linear", align_corners=False)[0].T

    rows, columns = along(grid[0], size[0]), along(grid[1], size[1])
    matrix = torch.einsum("yh,xw->yxhw", rows, columns).reshape(size[0] * size[1], -1)
    target, source = matrix.nonzero(as_tuple=True)
    weight = matrix[target, source].to(device).expand(batch, -1)
    target, source = target.to(device).expand(batch, -1), source.to(device).expand(batch, -1)
    return Mix(target, source, weight, size[0] * size[1])
