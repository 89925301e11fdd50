"""ThinK (Xu et al., ICLR 2025): thinner keys, of which whole channels go that the last queries make little of.

No token goes. Behind the prompt each head lets the same channels of all its keys go, except those of the last tokens,
by how much they can add to the products with the queries at the prompt's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.core.plan import Site
from prunelab.common.kv_cache.role import CacheSignals, ThinsVectors


def energy(x: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean square [B, H, d] of each channel of vectors x [B, H, N, d], over those that are real [B, H, N]."""
    squares = x.float().square()
    if real is None:
        return squares.mean(2)
    weights = real.unsqueeze(-1).float()
    return (squares * weights).sum(2) / weights.sum(2).clamp_min(1)


def query_driven(queries: Tensor, keys: Tensor) -> Tensor:
    """The score [B, KV, d] of channels, from the energies [B, H, d] of queries and [B, KV, d] of keys: as released, the
    product of both, which the norm of the paper's outer product Q_i K_i^T is, its square (equation 5). Query heads of a
    group count by their mean."""
    return queries.unflatten(1, (keys.shape[1], -1)).mean(2) * keys


def weakest(scores: Tensor, share: float) -> Tensor:
    """Mask [B, H, d] of the channels that go: the share of them, rounded down, that scores least."""
    gone = int(round(share * scores.shape[-1], 6))
    order = scores.argsort(dim=-1, stable=True)[..., :gone]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


@dataclass(frozen=True)
class ThinK(ThinsVectors):
    """Prunes channels of a prompt's keys by its last queries (arXiv 2407.21018).

    The budget is the share of the channels that stays. What is written behind the prompt stays whole.

    Parameters
    ----------
    part : {"keys", "values"}
        Which vectors lose channels. Of values the energy alone counts, as Mustafar's code has it.
    observers : int
        Last queries of the prompt that channels are judged by.
    recent : int
        Last tokens of the prompt whose vectors stay whole.
    resting : bool
        Whether vectors with zeros become bitmaps only when the cache rests, as in Mustafar.
    """

    part: Literal["keys", "values"] = "keys"
    observers: PositiveInt = 32
    recent: NonNegativeInt = 32
    resting: bool = True

    name: ClassVar[str] = "think"
    when = "prefill"
    exempt = {"budget": "every entry stays, with fewer channels"}

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"queries"} if self.part == "keys" else ())

    def frozen(self, entries: int) -> int:
        return max(entries - self.recent, 0)

    def thin(
        self, site: Site, keys: Tensor, values: Tensor, added: int, budget: Budget, signals: CacheSignals | None = None
    ) -> None:
        if budget.unit != "ratio":
            raise PrunelabError(f"think keeps a share of the channels, not {budget}; give a ratio")
        end = keys.shape[2] - self.recent
        if signals is None or end <= 0:
            return
        vectors = keys if self.part == "keys" else values
        scores = energy(vectors, signals.valid)
        if self.part == "keys":
            asking = signals.asking
            real = None if asking is None else asking[:, None, -self.observers :]
            scores = query_driven(energy(signals.queries[:, :, -self.observers :], real), scores)
        left = vectors[:, :, :end]
        left.masked_fill_(weakest(scores, 1 - budget.amounts[0]).unsqueeze(2), 0)
