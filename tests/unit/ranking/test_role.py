"""Rankers of any units, their services, and ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking.role import Ranker, Ranking
from prunelab.common.ranking.sentences import Passage
from prunelab.methods.lexrank.method import LexRank
from prunelab.methods.mead.method import Lead

FOUR = ("The first car is red.", "The second car is blue.", "The third car is green.", "The last car is white.")
HUB = ("A red fox ran.", "A blue whale swam.", "A red fox and a blue whale met.", "Quick tigers sleep.")


@dataclass(frozen=True)
class Words(Ranker[Sequence[str]]):
    """Words by the reward that each earns."""

    name: ClassVar[str] = "words"
    services: ClassVar[tuple[str, ...]] = ("reward",)

    def rank(self, units: Sequence[str], services: Mapping[str, Any] | None = None) -> Tensor:
        assert services is not None
        return torch.tensor([float(services["reward"](unit)) for unit in units])


def test_units_are_what_the_method_ranks():
    plan = Words().plan(["a", "ccc", "bb"], Budget(2, "count"), {"reward": len})
    assert plan.reduce.index.tolist() == [[1, 2]]
    with pytest.raises(PrunelabError, match="needs the service 'reward'"):
        Words().plan(["a"], Budget(1, "count"))
    with pytest.raises(PrunelabError, match="NaN or infinite"):
        Words().plan(["a"], Budget(1, "count"), {"reward": lambda word: float("nan")})


def test_ties_are_told():
    summary = LexRank().summarise(FOUR, Budget(2, "count"))
    assert summary == list(FOUR[:2]) and summary.tied, "every pair is linked: nothing but order decides"
    assert not LexRank().summarise(FOUR, Budget(4, "count")).tied, "nothing was left out"
    assert not LexRank().summarise(HUB, Budget(1, "count")).tied
    assert LexRank().ranking(Passage(FOUR)).tied([0, 1]) and not Lead().summarise(FOUR, Budget(2, "count")).tied


def test_a_tie_between_those_left_out_alone_is_none():
    ranking = Ranking(torch.tensor([3.0, 1.0, 1.0, 2.0]), [0, 3, 1, 2])
    assert not ranking.tied([0]) and not ranking.tied([0, 3]) and ranking.tied([0, 3, 1]) and not ranking.tied([])
    assert Ranking(torch.tensor([1.0, 1.0 + 1e-12]), [1, 0]).tied([1]), "closer than nine decimals"


def test_broken_characters_do_not_stop_a_budget_in_bytes():
    assert len(Lead().summarise(["One \ud800 cow.", "Two cows."], Budget(100, "bytes"))) == 2
