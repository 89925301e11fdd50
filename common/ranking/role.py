"""The role of methods that rank units: context tokens, entries of a vocabulary, sentences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.core.plan import Gather, Plan

Units = TypeVar("Units", bound=Sized)


@dataclass(frozen=True)
class Ranking:
    """Scores [n] of units, larger is better, and the units from the best to the worst; what the order leaves out is
    never kept."""

    scores: Tensor
    order: Sequence[int]

    def tied(self, kept: Collection[int]) -> bool:
        """Whether a unit left out scores as high as one that is kept, so that the order of the text chose, not the
        method."""
        chosen = torch.zeros(len(self.scores), dtype=torch.bool)
        chosen[list(kept)] = True
        if bool(chosen.all()) or not bool(chosen.any()):
            return False
        scores = levels(self.scores)
        return bool(torch.isin(scores[chosen], scores[~chosen]).any())


def levels(scores: Tensor) -> Tensor:
    """Scores [n] over the largest, rounded to nine decimals: what is closer together is a tie."""
    scores = scores.double()
    return (scores / scores.abs().max().clamp_min(1e-300)).round(decimals=9)


class Ranker(Method, Generic[Units]):
    """Ranks units and keeps the best under a budget.

    What units are is the method's business: a tensor of token ids, a list of words, a `Passage`. Second models come as
    `services` by the names that the method declares: `next_token_logits`, `replace`, `reward`.
    """

    role: ClassVar[str] = "ranker"

    @abstractmethod
    def rank(self, units: Units, services: Mapping[str, Any] | None = None) -> Tensor:
        """Scores [n], larger is better."""

    def order(self, units: Units, scores: Tensor) -> list[int]:
        """Units from the best to the worst, ties to the earlier one. What is left out here is never chosen."""
        order: list[int] = selection.descending(scores).tolist()
        return order

    def ranking(self, units: Units, services: Mapping[str, Any] | None = None) -> Ranking:
        """Scores and order."""
        missing = [name for name in self.services if name not in (services or {})]
        if missing:
            raise PrunelabError(f"{self.name} needs the service '{missing[0]}'; give services={{'{missing[0]}': ...}}")
        scores = self.rank(units, services)
        if not bool(torch.isfinite(scores).all()):
            raise PrunelabError(f"{self.name} gives scores that are NaN or infinite; check the input")
        return Ranking(scores, self.order(units, scores))

    def take(self, units: Units, ranking: Ranking, budget: Budget) -> list[int]:
        """The units that stay, ascending: best first while the budget lasts."""
        return sorted(ranking.order[: budget.count(len(units))])

    def plan(self, units: Units, budget: Budget, services: Mapping[str, Any] | None = None) -> Plan:
        """Units that stay, [1, K] in original order."""
        kept = self.take(units, self.ranking(units, services), budget)
        return Plan(Gather(torch.tensor([kept], dtype=torch.long)))
