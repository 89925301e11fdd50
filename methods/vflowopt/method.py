"""VFlowOpt (Yang et al., ICCV 2025): visual tokens leave before a decoder and twice within it, by one map of
importance.

Unit: a visual token of the decoder's sequence, newlines of a large image included. Its importance is the attention that
the image encoder's most attended patches pay it. Of those that leave first, some are recycled: the weighted mean of a
cell of the picture stands where its best token was. How hard each stage prunes is found once a model (`search`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import attention
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat
from prunelab.common.core.plan import Mix, ModelInfo, Plan, Positions, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Rows = Callable[[int, int], Tensor]  # attention [B, H, stop - start, N] of some rows


def trusted(received: Tensor, threshold: float) -> Tensor:
    """The patches [B, N] that receive more attention than so many times the mean; where none does, the most attended
    one (assumption; the released code divides by zero there)."""
    result = received > threshold * received.mean(1, keepdim=True)
    best = torch.zeros_like(result).scatter(1, received.argmax(1, keepdim=True), True)
    return torch.where(result.any(1, keepdim=True), result, best)


def calibrated(rows: Rows, shape: tuple[int, int, int], threshold: float) -> tuple[Tensor, Tensor]:
    """Eq. 4 without its second term: the mean attention [B, N] that the trusted patches pay each patch, over heads, and
    which those are; of an attention of shape (B, H, N). The whole map is never held at once."""
    received = attention.received(rows, shape).mean(1) / shape[2]
    trust = trusted(received, threshold)
    return attention.received(rows, shape, trust).mean(1) / trust.sum(1, keepdim=True), trust


def patch_entropy(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Entropy in bits [B, N] of the grey levels of every patch of images [B, 3, H, W]. Pixels are multiplied by 255 and
    cut to a byte, so that the negative ones of a normalised image wrap around, as released."""
    levels = (pixels.float() * 255).long() % 256
    grey = (levels.float() * 0.3333).sum(1).round().long()
    height, width = grey.shape[1] // grid[0], grey.shape[2] // grid[1]
    cut = grey[:, : height * grid[0], : width * grid[1]].unflatten(2, (grid[1], width)).unflatten(1, (grid[0], height))
    patches = cut.transpose(2, 3).flatten(3).flatten(1, 2)  # [B, N, pixels]
    counts = torch.zeros(*patches.shape[:2], 256, device=patches.device)
    share = counts.scatter_add(2, patches, torch.ones_like(patches, dtype=torch.float32)) / patches.shape[2]
    return -(share * (share + 1e-10).log2()).sum(-1)


def dropped(tokens: int, ratio: float) -> int:
    """How many of so many tokens leave, rounded."""
    return round(tokens * (1 - ratio))


def recycled(
    importance: Tensor, base: int, side: int, width: int, cell: float, ratio: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What becomes of a large picture's tokens [n]: the first `base`, rows of `side`, are the thumbnail, the others
    rows of `width`, newline included.

    Equal ones, as newlines are, come in the order that torch's plain sort leaves them in, as released. The least
    important ones, as many as leave and n / cell^2 more, are put into cells of `cell` tokens a side. Returned
    are what stays [n] (the others, and of each cell the most important), the least important ones [m], which token each
    of them becomes part of [m], and with what weight [m].
    """
    total = len(importance)
    low = importance.argsort()[: min(total, dropped(total, ratio) + int(total / cell**2))]
    local = low >= base
    place, stride = torch.where(local, low - base, low), torch.where(local, width, side)
    row, column = (place // stride / cell).floor().long(), (place % stride / cell).floor().long()
    across = int(max(side, width) / cell) + 1
    down = int(max(side, (total - base) // max(width, 1)) / cell) + 1
    slot, slots = (local * down + row) * across + column, 2 * down * across
    value = importance[low]
    best = value.new_zeros(slots).scatter_reduce(0, slot, value, "amax", include_self=False)
    turn = torch.arange(len(low), device=low.device)
    first = torch.full((slots,), len(low), device=low.device)
    first = first.scatter_reduce(0, slot, torch.where(value == best[slot], turn, len(low)), "amin")
    stands = low[first[slot]]
    whole = value.new_zeros(slots).index_add(0, slot, value)
    stays = torch.ones(total, dtype=torch.bool, device=low.device)
    stays[low] = False
    stays[stands] = True
    return stays, low, stands, value / whole[slot].clamp_min(torch.finfo(value.dtype).tiny)


def merged(tokens: Tensor, low: Tensor, stands: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the tokens [n, D] are changed, [c] ascending, and what they become, [c, D]: the weighted sums of what
    their cells hold; see `recycled`."""
    cells, slot = stands.unique(return_inverse=True)
    mix = Mix(slot.unsqueeze(0), low.unsqueeze(0), weight.unsqueeze(0), len(cells))
    return cells, mix.apply(tokens.unsqueeze(0))[0]


@dataclass(frozen=True)
class VFlowOpt(TokenPruner):
    """VFlowOpt (arXiv 2508.05211): prunes before the decoder, with recycling, and twice within it, by the importance
    that the image encoder's trusted patches give.

    The budget is the share of the visual tokens that goes on at each stage, R1, R2 and R3; what leaves is rounded. The
    released strategies for a half, a quarter and a tenth on average are on the method's page.

    Parameters
    ----------
    threshold : float
        t: patches are trusted that receive so many times the mean attention.
    entropy : float
        alpha: weight of the softmax of the patches' entropy. 0 in every released strategy.
    cell : float
        a: side of the cells, in tokens, in which what leaves a large picture first is recycled.
    layers : tuple of int, optional
        Decoder layers before which tokens leave; None: at a third and two thirds of the depth (9 and 18 of 28).
    calibrate, recycle : bool
        Without, importance is the attention received from all patches, and nothing is recycled (the paper's table 6).
    positions : str
        Within the decoder kept tokens keep their position numbers, as released. Before it all are numbered anew.
    """

    threshold: NonNegativeFloat = 34.759552803070484
    entropy: FiniteFloat = 0.0
    cell: PositiveFloat = 15.580797034937687
    layers: tuple[NonNegativeInt, ...] | None = None
    calibrate: bool = True
    recycle: bool = True
    positions: Positions = "original"

    name: ClassVar[str] = "vflowopt"
    exempt = {
        "budget": "what leaves is rounded, and of what is recycled one token a cell stays",
        "padding": "importance is that of whole crops; on signals without pictures padding has a say in it",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layers = (info.depth // 3, 2 * (info.depth // 3)) if self.layers is None else self.layers
        return [Site(0, "packed"), *(Site(layer, "input") for layer in sorted({*layers}))]

    def readings(self) -> list[Reading]:
        """What is read of the image encoder."""
        names = ("queries", "keys") if self.calibrate else ("received",)
        return [Reading(name, -1, "tower") for name in names]

    def requires(self, site: Site) -> frozenset[str | Reading]:
        return frozenset({"hidden", *self.readings()} if site.where == "packed" else ())

    def importance(self, picture: TokenSignals) -> Tensor:
        """Of every patch of one picture's crops (or of several of one shape), [B, units]."""
        crops = max(1, len(picture.grids))
        results = [picture.at(reading).float().unflatten(2, (crops, -1)) for reading in self.readings()]
        results = [x.transpose(1, 2).flatten(0, 1) for x in results]  # [B * crops, H, N, ...]
        if self.calibrate:
            q, k = results

            def rows(start: int, stop: int) -> Tensor:
                return attention.weights(q[:, :, start:stop], k, q.shape[-1] ** -0.5)

            scores, _ = calibrated(rows, (q.shape[0], q.shape[1], q.shape[2]), self.threshold)
        else:
            scores = results[0].mean(1) / results[0].shape[2]
        if self.entropy and picture.pixels is None:
            raise PrunelabError(f"{self.name}: this model's encoder is not given whole crops; take entropy=0")
        if self.entropy and picture.pixels is not None and scores.device.type != "meta":
            bits = patch_entropy(picture.pixels.flatten(0, 1), picture.grids[0])
            scores = scores + self.entropy * bits.softmax(-1)
        return scores.unflatten(0, (-1, crops)).flatten(1)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        available = signals.available()
        counts = [n - dropped(n, self.share(budget, n)) for n in available]
        if site.where == "input":  # the same map, of what is left of it
            assert signals.indices is not None
            scores = signals.state["importance"].gather(1, signals.indices)
            return Plan(signals.keep(counts, scores=scores), positions=self.positions)
        if signals.pictures is None:
            return Plan(signals.keep(counts, scores=self.importance(signals)), positions="renumber")
        pictures = signals.pictures()
        maps = {id(one): self.importance(one) for own in pictures for one in own}
        scores = torch.zeros_like(signals.prunable, dtype=torch.float32)
        signals.state["importance"] = scores
        if scores.device.type == "meta":
            return Plan(signals.keep(counts, scores=scores), positions="renumber")
        keep = torch.zeros_like(signals.prunable)
        changed: list[tuple[int, Tensor, Tensor]] = []  # sample, places [c] and what stands there then [c, D]
        for sample, own in enumerate(pictures):
            indices = signals.prunable[sample].nonzero().squeeze(1)
            for picture in own:
                values, broken = self.packed(picture, maps[id(picture)])
                mine, indices = indices[: len(values)], indices[len(values) :]
                scores[sample, mine] = values
                keep[sample, mine], cells = self.first_stage(picture, values, broken, budget)
                for low, stands, weight in cells:
                    changed.append((sample, *merged(signals.hidden[sample], mine[low], mine[stands], weight)))
        signals.state["recycled"] = changed
        return Plan(signals.keep(mask=keep), positions="renumber")

    def share(self, budget: Budget, tokens: int) -> float:
        """The budget's share of so many tokens."""
        return budget.amounts[0] if budget.unit == "ratio" else budget.count(tokens) / max(tokens, 1)

    def packed(self, picture: TokenSignals, values: Tensor) -> tuple[Tensor, Tensor]:
        """Importance [n] of the tokens that a decoder reads of a picture, 1 for newlines, and which are those."""
        assert picture.pack is not None
        broken = picture.pack(torch.ones_like(values))[0] == 0
        return picture.pack(values)[0].masked_fill(broken, 1.0), broken

    def first_stage(
        self, picture: TokenSignals, values: Tensor, broken: Tensor, budget: Budget
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Which of a picture's tokens [n] go on, and, if anything is recycled, what in which; see `recycled`."""
        total, ratio = len(values), self.share(budget, len(values))
        if picture.mosaic is None or not self.recycle or ratio == 1:
            best = values.argsort(descending=True, stable=True)[: total - dropped(total, ratio)]
            return torch.zeros_like(broken).index_fill(0, best, True), []
        height, side = picture.grids[0]
        base = height * side
        width = int(broken.nonzero()[0]) - base + 1
        stays, low, stands, weight = recycled(values, base, side, width, self.cell, ratio)
        return stays, [(low, stands, weight)]

    def refine(self, site: Site, hidden: Tensor, signals: TokenSignals, plan: Plan) -> Tensor:
        for sample, places, tokens in signals.state.get("recycled", ()) if site.where == "packed" else ():
            index, valid = plan.reduce.index[sample], plan.reduce.valid  # type: ignore[union-attr]
            left = index if valid is None else index.masked_fill(~valid[sample], -1)  # padding is in front or behind
            hidden[sample, (left == places.unsqueeze(1)).int().argmax(1)] = tokens.to(hidden)
        return hidden
