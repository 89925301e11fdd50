"""DART (Wen et al., EMNLP 2025): what decides is not how important a token is, but how much others repeat it.

Unit: an image token of the decoder's sequence. A few pivots, image and text, each choose the image tokens that are
least like them; what is left repeats one of them and goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site, take
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Visit = Literal["set", "norm"]


def key_norm(keys: Tensor) -> Tensor:
    """L1 norm [B, N] of every token's key, its heads [B, H, N, d] taken together."""
    return keys.float().abs().sum((1, 3))


def pivots(norm: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` tokens of largest norm among those of a mask [B, N], best first: indices [B, C], and which of them
    are real, where a sample has fewer."""
    order = selection.descending(norm.masked_fill(~among, -1))[:, :count]
    return order, among.gather(1, order)


def set_order(index: Tensor, real: Tensor) -> Tensor:
    """The places [B, P] of pivots [B, P] in the order in which the released code visits them: that of a set of Python's
    integers, which depends on the numbers alone."""
    orders = []
    for row, there in zip(index.tolist(), real.tolist(), strict=True):
        numbers = [number for number, is_there in zip(row, there, strict=True) if is_there]
        visited = [
            row.index(number) for number in set(numbers)
        ]  # of a list: a dictionary would size the table otherwise
        orders.append(visited + [i for i in range(len(row)) if i not in visited])
    return torch.tensor(orders, device=index.device)


def retained(similarity: Tensor, own: Tensor, real: Tensor, prunable: Tensor, each: Tensor | int) -> Tensor:
    """In what order tokens stay [B, N], larger is earlier, for the cosines [B, P, N] of pivots in the order of their
    visits, of which `real` [B, P] are there.

    The pivots among the image tokens come first, `own` [B, N]. Then each pivot in turn takes the `each` (of every
    sample, [B, 1]) tokens least similar to it that nobody took. Last come the others, least similar to any first.
    """
    batch, count, _ = similarity.shape
    most = similarity.masked_fill(~real.unsqueeze(-1), -1).amax(1)
    score = torch.where(own, count + 2.0, -most)
    free = prunable & ~own
    rank = torch.arange(free.shape[1], device=free.device).expand(batch, -1)
    for turn in range(count):
        order = similarity[:, turn].masked_fill(~free, float("inf")).argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter(1, order, rank)
        taken = (place < each) & free & real[:, turn, None]
        score = torch.where(taken, 1.0 + count - turn, score)
        free = free & ~taken
    return score


@dataclass(frozen=True)
class DART(TokenPruner):
    """DART (arXiv 2502.11494): keeps the image tokens least similar to a few pivots.

    Of N image tokens and a budget that is a share s, every pivot chooses int(s N / pivots), and the image's own pivots
    stay on top, as released: the 0.333, 0.222 and 0.111 of its script (192, 128 and 64 of 576) leave 188, 124 and 60. A
    budget of everything keeps everything.

    Parameters
    ----------
    layers : tuple of int
        K, the first layer, from 0, that sees fewer tokens; keys and states are those of layer K - 1. The released code
        knows a second one, 20, which is off.
    image_pivots, text_pivots : int
        How many there are, by the norm of their keys.
    visit : {"set", "norm"}
        In which order pivots choose: that of the released code, a set's, which Python makes and for which eight numbers
        are looked at; or the image's and then the text's, each by norm.
    positions : str
        Kept tokens keep their position numbers, as released, or are numbered anew.
    """

    layers: tuple[NonNegativeInt, ...] = (2,)
    image_pivots: NonNegativeInt = 4
    text_pivots: NonNegativeInt = 4
    visit: Visit = "set"
    positions: Positions = "original"

    name: ClassVar[str] = "dart"
    exempt = {"budget": "the image's pivots stay on top of a whole number of tokens for every pivot, as released"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_pivots + self.text_pivots < 1:
            raise PrunelabError(f"{self.name}: image_pivots and text_pivots must make at least one pivot")

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "input") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"normed", "keys"})

    def each(self, budget: Budget, units: int) -> int:
        """How many of so many image tokens every pivot chooses."""
        share = budget.amounts[0] if budget.unit == "ratio" else budget.count(units) / max(units, 1)
        return int(round(share * units / (self.image_pivots + self.text_pivots), 6))

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        prunable, valid, available = signals.prunable, signals.valid, signals.available()
        pivot_count = self.image_pivots + self.text_pivots
        each = [self.each(budget, n) for n in available]
        left = [
            n if budget.count(n) == n else min(n, self.image_pivots + pivot_count * k)
            for n, k in zip(available, each, strict=True)
        ]
        seen = prunable.long().cumsum(1)
        behind = (seen == seen[:, -1:]) & ~prunable  # the text that follows the image
        behind = behind if valid is None else behind & valid
        norm = key_norm(signals.keys)
        image, in_image = pivots(norm, prunable, self.image_pivots)
        text, in_text = pivots(norm, behind, self.text_pivots)
        index, real = torch.cat([image, text], 1), torch.cat([in_image, in_text], 1)
        if self.visit == "set" and index.device.type != "meta":
            first = 0 if valid is None else valid.int().argmax(1, keepdim=True)  # padding in front is not counted
            order = set_order(index - first, real)
            index, real = index.gather(1, order), real.gather(1, order)
        unit = nn.functional.normalize(signals.normed.float(), dim=-1)
        similarity = take(unit, index) @ unit.transpose(1, 2)
        own = torch.zeros_like(prunable).scatter(1, image, in_image)
        share = each[0] if valid is None else torch.tensor(each, device=norm.device).unsqueeze(1)
        scores = retained(similarity, own, real, prunable, share)
        return Plan(signals.keep(left, scores=scores), positions=self.positions)
