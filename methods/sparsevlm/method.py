"""SparseVLM (Zhang et al., ICML 2025): the words that are about the picture say, layer by layer, what they need of it.

Unit: a visual token in the decoder. Those that go leave a few tokens behind, which stand for clusters of their best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from prunelab.common.core.plan import Mix, ModelInfo, Plan, Positions, Site, take
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def text_raters(visual: Tensor, text: Tensor, seen: Tensor, real: Tensor) -> Tensor:
    """Mask [B, R] of the text tokens that are about the picture: those to which the visual embeddings [B, M, D] attend
    more than to the mean one, in a softmax over the text's [B, R, D]. seen [B, M] and real [B, R] are False at padding;
    where no token stands out all rate."""
    attention = (visual @ text.transpose(1, 2)).masked_fill(~real.unsqueeze(1), float("-inf")).softmax(-1)
    score = (attention * seen.unsqueeze(2)).sum(1) / seen.sum(1, keepdim=True)
    mean = (score * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    raters = real & (score > mean)
    return torch.where(raters.any(1, keepdim=True), raters, real)


def rated(attention: Tensor, raters: Tensor) -> Tensor:
    """The score [B, N] of every token: the attention [B, H, R, N] of raters [B, R], averaged over heads and them."""
    return (attention.mean(1) * raters.unsqueeze(2)).sum(1) / raters.sum(1, keepdim=True)


def rotary_response(rows: Tensor, columns: Tensor, width: int, base: float) -> Tensor:
    """[B, R, N] the logit of a query and a key of ones at positions rows [B, R] and columns [B, N], for heads of that
    width: what rotary embeddings alone prefer."""
    frequency = base ** (-torch.arange(0, width, 2, device=rows.device, dtype=torch.float32) / width)
    apart = (rows.unsqueeze(2) - columns.unsqueeze(1)).float().unsqueeze(-1)
    return 2 * (apart * frequency).cos().sum(-1) / width**0.5


def best_heads(attention: Tensor, raters: Tensor, visual: Tensor, heads: int) -> Tensor:
    """Of attention [B, H, R, N] the heads in which raters [B, R] pay most to visual tokens [B, N]."""
    mass = (attention * (raters.unsqueeze(2) & visual.unsqueeze(1)).unsqueeze(1)).sum((2, 3))
    return take(attention, mass.topk(min(heads, attention.shape[1]), dim=1).indices)


def rank(attention: Tensor, raters: Tensor, visual: Tensor) -> int:
    """Version 1.0: the rank of the attention [H, R, N] of raters [R] to visual tokens [N], averaged over heads."""
    return int(torch.linalg.matrix_rank(attention.float().mean(0)[raters][:, visual]))


def clusters(tokens: Tensor, count: int, noise: Tensor | None = None) -> Tensor:
    """Which of `count` clusters, the densest peak's first, each of the tokens [B, M, D] is in (density peaks by as many
    neighbours)."""
    distance = selection.scaled_distance(tokens.float())
    # two that are each other's nearest are peaks of one height: in the released order, that of torch's top-k
    centres = selection.peak_scores(distance, count, noise).topk(count, dim=1).indices
    slot = take(distance, centres).argmin(1)
    return slot.scatter(1, centres, torch.arange(count, device=slot.device).expand_as(centres))


def recycled(
    tokens: Tensor, scores: Tensor, visual: Tensor, units: int, keep: int, share: float, divisor: int, jitter: float
) -> Mix:
    """Tokens [B, N, D] without all but the `keep` best of their `units` visual ones [B, N], by scores [B, N]. Of those
    that go the best `share` are merged into clusters, a `divisor`-th as many, behind the visual tokens that stay."""
    batch, total = scores.shape
    ranked = scores.float().masked_fill(~visual, float("-inf")).argsort(dim=1, descending=True, stable=True)
    gone = units - keep
    merged = int(share * gone) + 1 if gone else 0
    count = int(merged / divisor) + 1 if merged else 0
    stays = (~visual).scatter(1, ranked[:, :keep], True)
    kept = stays.int().argsort(dim=1, descending=True, stable=True)[:, : total - gone]
    source = ranked[:, keep : keep + merged]  # the best first
    weight = torch.ones(batch, kept.shape[1] + merged, device=kept.device)
    last = (visual * torch.arange(total, device=kept.device)).amax(1, keepdim=True)  # where the picture ends
    indices = torch.cat([kept.double(), last + torch.arange(1, count + 1, device=kept.device) / (count + 1)], 1)
    order = indices.argsort(1).argsort(1)
    target = order[:, : kept.shape[1]]
    if merged:
        noise = jitter * torch.rand(source.shape, device=source.device) if jitter else None
        slot = clusters(take(tokens, source), count, noise)
        sizes = weight.new_zeros(batch, count).scatter_add(1, slot, weight[:, :merged])
        weight[:, kept.shape[1] :] = 1 / (sizes.gather(1, slot) + 1e-6)
        target = torch.cat([target, order[:, kept.shape[1] :].gather(1, slot)], 1)
    return Mix(target, torch.cat([kept, source], 1), weight, order.shape[1])


@dataclass(frozen=True)
class SparseVLM(TokenPruner):
    """SparseVLM (arXiv 2410.04417): drops the visual tokens that the words about the picture attend to least, behind a
    few layers, and merges the best of them.

    The budget says how many visual tokens stay behind each layer, merged ones apart, and never all of them. The
    defaults are version 1.5. Version 1.0 is `layers=(3, 7, 16, 20), adaptive=True`, and SparseVLM+ `share=0,
    positions="original", debias=True, heads=14`.

    Parameters
    ----------
    layers : tuple of int
        Before which layers tokens leave, counted from 0; those that a decoder does not have are left out.
    share, divisor : float, int
        Of the tokens that go, the share that is merged, and how many of these make one cluster. 0: none is merged.
    adaptive, scale, bias : bool, float, float
        Whether the rank of the attention says how many stay, scale * rank + bias, and the budget only at most how many.
    debias, base : bool, float
        Whether attention is divided by what rotary embeddings of that base alone prefer.
    heads : int, optional
        How many heads are averaged, those that look at the picture most; None: all.
    jitter : float
        Noise that parts clusters of one density; 1e-6 as released, where no two runs are then the same.
    positions : str
        The tokens that are left are numbered anew, or keep their numbers.
    """

    layers: tuple[NonNegativeInt, ...] = (3, 7, 16)
    share: Share = 0.3
    divisor: PositiveInt = 10
    adaptive: bool = False
    scale: NonNegativeFloat = 13.5
    bias: NonNegativeFloat = 0.0
    debias: bool = False
    base: PositiveFloat = 10000.0
    heads: PositiveInt | None = None
    jitter: NonNegativeFloat = 0.0
    positions: Positions = "renumber"

    name: ClassVar[str] = "sparsevlm"
    exempt = {
        "budget": "merged tokens come besides, and not all tokens stay",
        "keep_all": "not all tokens stay",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.debias and self.share:
            raise PrunelabError(f"{self.name}: a merged token has no place of its own; take share=0 with debias")

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layers = [layer for layer in self.layers if 0 < layer < info.depth]
        if not layers:
            raise PrunelabError(
                f"{self.name} drops at none of this model's {info.depth} layers; set the method's layers"
            )
        return [Site(layer, "input") for layer in layers]

    def requires(self, site: Site) -> frozenset[Signal]:
        read: set[Signal] = {"hidden", Reading("attention", site.layer - 1, rows="text")}
        return frozenset(read | {Reading("hidden", -1)} if site.index == 0 else read)

    def raters(self, signals: TokenSignals, rows: Tensor) -> Tensor:
        """Mask [B, R] of the rows [B, R], the sequence's last, that rate; found once, from what enters the decoder."""
        if "raters" not in signals.state:
            embedded, visual = signals.at(Reading("hidden", -1)).float(), signals.prunable
            last = (visual * torch.arange(visual.shape[1], device=visual.device)).amax(1, keepdim=True)
            real = rows > last
            real = torch.where(real.any(1, keepdim=True), real, torch.ones_like(real))
            seen = signals.candidates()
            valid = visual.gather(1, seen)
            result = text_raters(take(embedded, seen), take(embedded, rows.clamp_min(0)), valid, real)
            signals.state["raters"] = result
        raters: Tensor = signals.state["raters"]
        return raters

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        attention = signals.at(Reading("attention", site.layer - 1, rows="text")).float()  # [B, H, R, N]
        count, total = attention.shape[2:]
        if not count:
            raise PrunelabError(f"{self.name}: no text stands behind the picture to rate it; ask a question there")
        valid = signals.valid
        end = total - 1 if valid is None else total - 1 - valid.flip(1).int().argmax(1, keepdim=True)
        rows = end - torch.arange(count - 1, -1, -1, device=attention.device).expand(len(attention), -1)
        raters, visual = self.raters(signals, rows), signals.prunable
        if self.debias:
            assert signals.indices is not None
            response = rotary_response(
                signals.indices.gather(1, rows.clamp_min(0)),
                signals.indices,
                signals.info.width // signals.info.heads,
                self.base,
            )
            attention = attention / response.unsqueeze(1)
        if self.heads is not None:
            attention = best_heads(attention, raters, visual, self.heads)
        scores = rated(attention, raters)
        counts = [self.stays(n, budget, attention[b], raters[b], visual[b]) for b, n in enumerate(signals.available())]
        if not self.share:
            return Plan(signals.keep(counts, scores=scores), positions=self.positions)
        if valid is None and len(set(counts)) == 1:
            reduce = self.merging(signals.hidden, scores, visual, signals.units, counts[0])
            return Plan(reduce, positions=self.positions)
        mixes = []
        for b, (keep, units) in enumerate(zip(counts, signals.available(), strict=True)):
            own = torch.arange(total, device=scores.device) if valid is None else valid[b].nonzero().squeeze(1)
            tokens, own_scores, seen = signals.hidden[b : b + 1, own], scores[b : b + 1, own], visual[b : b + 1, own]
            mix = self.merging(tokens, own_scores, seen, units, keep)
            mixes.append(replace(mix, source=own[mix.source]))
        return Plan(selection.side_by_side(mixes), positions=self.positions)

    def merging(self, tokens: Tensor, scores: Tensor, visual: Tensor, units: int, keep: int) -> Mix:
        """See `recycled`."""
        return recycled(tokens, scores, visual, units, keep, self.share, self.divisor, self.jitter)

    def stays(self, units: int, budget: Budget, attention: Tensor, raters: Tensor, visual: Tensor) -> int:
        """How many of a sample's visual tokens stay."""
        most = max(0, min(budget.count(units), units - 1))
        if not self.adaptive or attention.device.type == "meta":
            return most
        result = rank(attention, raters, visual)
        return units if result == units else min(int(result * self.scale + self.bias), most)
