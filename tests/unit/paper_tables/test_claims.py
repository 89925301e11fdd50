"""Claims to check get their verdict from paired differences on boards."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from prunelab.common.experiments import papers
from prunelab.paper_tables import claims
from prunelab.paper_tables.join import Point, Value

SAMPLES = [1.0, 1.2, 0.9, 1.1, 1.0, 1.3]


class Held:
    """Records whose samples are given by address."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self.metrics = metrics

    def at(self, address: str) -> dict[str, Any]:
        return {"metrics": {"accuracy": {"value": 1.0, "samples": self.metrics[address]}}}


def verdict(gaps: Mapping[str, float | None], metric: str = "accuracy") -> list[claims.Verdict]:
    """Of the claim that A is better than B, where their samples differ by so much at each budget."""
    points, samples = [], {}
    for budget, gap in gaps.items():
        for entry, offset in (("A", gap), ("B", 0.0)):
            address = f"{entry}-{budget}" if offset is not None else None
            points.append(Point(entry, budget, "testbed", Value("testbed", 1.0 if address else None, record=address)))
            if offset is not None:
                samples[f"{entry}-{budget}"] = [x + offset * (1 + 0.1 * i) for i, x in enumerate(SAMPLES)]
    board: Any = SimpleNamespace(
        name="b", scale="testbed", points=points, board=SimpleNamespace(task="perplexity", metric=metric)
    )
    paper: Any = SimpleNamespace(slug="p", claims=("A > B",))
    records: Any = Held(samples)
    return list(claims.verdicts(paper, [board], records))


def test_intervals_decide() -> None:
    (held,) = verdict({"0.5": 1.0, "0.7": 0.0})
    assert held.outcome == "held" and held.text == "held at 0.5; within chance at 1 of 2 budgets"
    (failed,) = verdict({"0.5": -1.0})
    assert failed.outcome == "did not hold" and failed.text == "failed at 0.5"
    (mixed,) = verdict({"0.5": 1.0, "0.7": -1.0})
    assert mixed.outcome == "undecided"
    (none,) = verdict({"0.5": 0.0})
    assert none.outcome == "undecided" and none.compared == 1


def test_what_has_no_record_or_judges_no_quality_gets_no_verdict() -> None:
    assert verdict({"0.5": None}) == []
    assert verdict({"0.5": 1.0}, "tokens") == []


@pytest.mark.parametrize(
    ("claim", "said"),
    [("AMP better than random", "write it as 'A > B'"), ("AMP > magic", "no board holds both sides.*reversed order")],
)
def test_a_claim_names_entries_of_a_board(claim: str, said: str) -> None:
    paper = papers.load("amp")
    with pytest.raises(ValidationError, match=said):
        papers.Paper.model_validate({**paper.model_dump(), "claims": (claim,)})


def test_claims_of_papers_stand_on_their_boards() -> None:
    assert sum(len(papers.load(slug).claims) for slug in papers.slugs()) > 50
