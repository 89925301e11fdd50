"""Claims to check and contrasts get their verdicts from paired differences on boards."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from prunelab.common.experiments import papers, schema
from prunelab.paper_tables import claims, contrasts, grids
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
        schema.Paper.model_validate({**paper.model_dump(), "claims": (claim,)})


def test_claims_of_papers_stand_on_their_boards() -> None:
    assert sum(len(papers.load(slug).claims) for slug in papers.slugs()) > 50


LOSSES = {"first": [1.0, 1.2, 0.9, 1.1], "second": [1.5, 1.6, 1.5, 1.7], "third": [1.01, 1.19, 0.9, 1.1]}


class Losses:
    """Records of the losses behind a perplexity, by entry; and the record of a figure's run."""

    def at(self, address: str) -> dict[str, Any]:
        if address == "run-made":
            return {"metrics": self.metrics}
        return {"metrics": {"perplexity": {"value": 3.0}, "loss": {"value": 1.0, "samples": LOSSES[address]}}}

    metrics: Mapping[str, Any] = {
        name: {"value": 2.0, "stderr": 0.1, "samples": values, "protocol": "mean over 3 seeds"}
        for name, values in LOSSES.items()
    }

    def get(self, run: Any) -> tuple[dict[str, Any], bool]:
        return {"identity": "run", "sources": "made", "metrics": self.metrics}, False


def contrasted(*choices: str, figure: str = "", job: Any = "run") -> list[contrasts.Row]:
    points = [Point(e, "0.5", "testbed", Value("testbed", 3.0, record=e)) for e in LOSSES]
    points.append(Point("missing", "0.5", "testbed", Value("not run: needs time")))
    stated = SimpleNamespace(task="perplexity", metric="perplexity")
    board: Any = SimpleNamespace(name="b", scale="testbed", metric="perplexity", points=points, board=stated)
    named = schema.Contrast(name="pair", choices=(choices[0], choices[1]), figure=figure, metric="accuracy, %")
    paper: Any = SimpleNamespace(slug="p", contrasts=(named,))
    plan: Any = SimpleNamespace(figures=lambda slug: [SimpleNamespace(figure=SimpleNamespace(name="f"), run=job)])
    records: Any = Losses()
    return contrasts.rows(paper, [board], plan, records)


def test_contrasts_say_which_choice_is_better_by_the_losses_behind_a_perplexity() -> None:
    (row,) = contrasted("second", "first")
    assert row.better == "first" and row.difference == pytest.approx(0.525) and "nats" in row.of
    (tied,) = contrasted("first", "third")
    assert not tied.better and contrasts.verdict(tied) == "within chance"
    (missing,) = contrasted("first", "missing")
    assert missing.difference is None and contrasts.verdict(missing) == "–"
    text = grids.markdown(contrasts.grid("p", [row, missing]))
    assert "+0.53 ± 0.09" in text and "needs time" in text and "b, testbed, at 0.5" in text
    assert contrasts.csv([row]).splitlines()[1].startswith("pair,second,3,first,3,perplexity,0.525,")


def test_contrasts_of_a_figure_are_of_its_run() -> None:
    (row,) = contrasted("second", "first", figure="f", job=SimpleNamespace())
    assert row.better == "second" and row.metric == row.of == "accuracy, %" and row.values[0].record == "run-made"
    (waiting,) = contrasted("second", "first", figure="f", job="a package")
    assert waiting.values[0].status == "not run: needs a package" and waiting.difference is None
    assert contrasted("second", "first", figure="other") == []


@pytest.mark.parametrize(
    ("contrast", "said"),
    [
        ({"choices": ("unstructured", "magic")}, "no board holds both choices"),
        ({"choices": ("a", "b"), "figure": "magic"}, "unknown figure 'magic'"),
    ],
)
def test_a_contrast_names_entries_or_a_figure(contrast: dict[str, Any], said: str) -> None:
    paper = papers.load("pruning_survey")
    with pytest.raises(ValidationError, match=said):
        schema.Paper.model_validate({**paper.model_dump(), "contrasts": ({"name": "x", **contrast},)})
