"""What became of the claims to check: for each board that holds both methods, whether one is better than the other by
more than chance, from differences over the same samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prunelab.common import tasks
from prunelab.common.experiments import schema
from prunelab.common.metrics import uncertainty
from prunelab.paper_tables.join import BoardTable, Point, Records

Outcome = Literal["held", "did not hold", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """A claim on one board at one scale. held, failed: budgets at which the 95 % interval of the difference lies on the
    claim's side of zero, or on the other. compared: budgets at which both ran over the same samples."""

    slug: str
    claim: str
    board: str
    scale: str
    held: tuple[str, ...]
    failed: tuple[str, ...]
    compared: int

    @property
    def outcome(self) -> Outcome:
        """In a word: held at some budget and failed at none, the other way round, or neither."""
        if bool(self.held) == bool(self.failed):
            return "undecided"
        return "held" if self.held else "did not hold"

    @property
    def text(self) -> str:
        """With the budgets that decide it."""
        parts = [
            f"{word} at {', '.join(budgets)}"
            for word, budgets in (("held", self.held), ("failed", self.failed))
            if budgets
        ]
        left = self.compared - len(self.held) - len(self.failed)
        return "; ".join([*parts, *([f"within chance at {left} of {self.compared} budgets"] if left else [])])


def verdicts(paper: schema.Paper, boards: Sequence[BoardTable], records: Records) -> Iterator[Verdict]:
    """Every claim of a paper on every board that judges quality and holds both sides with records."""
    for claim in paper.claims:
        better, worse = schema.sides(claim)
        for board in boards:
            task = tasks.get(board.board.task)
            upward = task.metric(board.board.metric).higher_is_better
            if upward is None or not task.scales:
                continue
            held: list[str] = []
            failed: list[str] = []
            compared = 0
            for left, right in pairs(board.points, better, worse):
                gap = _gap(left, right, board.board.metric, records)
                if gap is None:
                    continue
                compared += 1
                difference, interval = gap if upward else (-gap[0], gap[1])
                if abs(difference) > interval:
                    (held if difference > 0 else failed).append(left.budget or right.budget or "none")
            if compared:
                yield Verdict(paper.slug, claim, board.name, board.scale, tuple(held), tuple(failed), compared)


def pairs(points: Sequence[Point], better: str, worse: str) -> Iterator[tuple[Point, Point]]:
    """Points of two entries under one budget; an entry without any stands against all of the other's."""
    for left in (p for p in points if p.entry == better):
        for right in (p for p in points if p.entry == worse):
            if left.budget == right.budget or None in (left.budget, right.budget):
                yield left, right


def _gap(left: Point, right: Point, metric: str, records: Records) -> tuple[float, float] | None:
    """The paired difference with its interval; of the loss where the metric is a perplexity, which has no samples."""
    if left.value.record is None or right.value.record is None:
        return None
    first, second = (records.at(str(p.value.record))["metrics"] for p in (left, right))
    name = "loss" if metric == "perplexity" and "loss" in first and "loss" in second else metric
    return uncertainty.paired_difference(first[name], second[name])
