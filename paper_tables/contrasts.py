"""A paper's contrasts in one table: pairs of choices with all else equal, from the records of its boards and figures.
Nothing is run for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunelab.common import tasks
from prunelab.common.experiments import schema
from prunelab.common.experiments.plans import Plan
from prunelab.common.experiments.run import Run
from prunelab.common.metrics import uncertainty
from prunelab.paper_tables import claims, tables
from prunelab.paper_tables.grids import Grid, Notes
from prunelab.paper_tables.join import MISSING, BoardTable, Records, Value

NAME = "contrasts"  # of the files


@dataclass(frozen=True)
class Row:
    """Two choices on one board, or in one run of a figure. difference: of the first to the second, in `of`, with its
    interval where their samples pair up. better: which of them is better by more than chance, if one is."""

    name: str
    choices: tuple[str, str]
    place: str
    metric: str  # in words
    values: tuple[Value, Value]
    difference: float | None = None
    interval: float | None = None
    of: str = ""
    better: str = ""


def rows(paper: schema.Paper, boards: Sequence[BoardTable], plan: Plan, records: Records) -> list[Row]:
    """Every contrast where both choices have records; one that has none anywhere stands with the reason."""
    results = []
    for contrast in paper.contrasts:
        found = _of_figure(contrast, paper.slug, plan, records) if contrast.figure else _of_boards(contrast, boards)
        results += list(_judged(contrast, found, records))
    return results


Found = tuple[str, str, bool | None, tuple[Value, Value], tuple[str, str]]  # place, label, more is better, metric names


def _of_boards(contrast: schema.Contrast, boards: Iterable[BoardTable]) -> Iterator[Found]:
    for board in boards:
        upward = tasks.get(board.board.task).metric(board.board.metric).higher_is_better
        for left, right in claims.pairs(board.points, *contrast.choices):
            budget = left.budget or right.budget
            place = f"{board.name}, {board.scale}" + (f", at {budget}" if budget else "")
            yield place, board.metric, upward, (left.value, right.value), (board.board.metric,) * 2


def _of_figure(contrast: schema.Contrast, slug: str, plan: Plan, records: Records) -> Iterator[Found]:
    for job in plan.figures(slug):
        if job.figure.name != contrast.figure:
            continue
        place = f"runs of the figure {job.figure.name}"
        record = None if isinstance(job.run, str) else records.get(job.run)[0]
        first, second = (_value(job.run, record, choice) for choice in contrast.choices)
        yield place, contrast.metric, True, (first, second), contrast.choices


def _value(run: Run | str, record: Mapping[str, Any] | None, choice: str) -> Value:
    if record is None or choice not in record["metrics"]:
        return Value(f"not run: needs {run if isinstance(run, str) else MISSING}")
    result = record["metrics"][choice]
    address = f"{record['identity']}-{record['sources']}"
    return Value(
        "testbed", result["value"], result.get("stderr"), result.get("n"), address, None, result.get("protocol", "")
    )


def _judged(contrast: schema.Contrast, found: Iterable[Found], records: Records) -> Iterator[Row]:
    for place, label, upward, values, names in found:
        row = Row(contrast.name, contrast.choices, place, label, values)
        if None in (values[0].record, values[1].record):
            yield row
            continue
        metrics = [records.at(str(value.record))["metrics"] for value in values]
        of = ["loss" if name == "perplexity" and "loss" in m else name for name, m in zip(names, metrics, strict=True)]
        paired = uncertainty.paired_difference(metrics[0][of[0]], metrics[1][of[1]])
        if paired is None:
            yield row
            continue
        gap, interval = paired
        better = ""
        if upward is not None and abs(gap) > interval:
            better = contrast.choices[0 if (gap > 0) is upward else 1]
        shown = "negative log likelihood, nats a token" if of != list(names) else label
        yield Row(contrast.name, contrast.choices, place, label, values, gap, interval, shown, better)


def verdict(row: Row) -> str:
    """In words."""
    if row.difference is None:
        return "–"
    return row.better or "within chance"


def grid(slug: str, contrasts: Sequence[Row]) -> Grid:
    """One line a contrast and board."""
    notes, lines = Notes(), []
    for row in contrasts:
        cells = []
        for choice, value in zip(row.choices, row.values, strict=True):
            note = notes(value.protocol or value.status) if value.protocol or value.value is None else ""
            cells += [choice, f"{tables.shown(value, 2) if value.value is not None else '–'} {note}".strip()]
        unit = notes(f"the difference is of {row.of}") if row.of not in ("", row.metric) else ""
        gap = f"{tables.gap(row.difference, row.interval)} {unit}".strip()
        lines.append([row.name, *cells, row.metric, gap, verdict(row), row.place])
    header = ["contrast", "first", "its value", "second", "its value", "metric", "difference", "better", "where"]
    right = [False, False, True, False, True, False, True, False, False]
    legend = ["± is the 95 % half width; differences are paired over the same samples."]
    return Grid(f"{slug}: contrasts", (CAPTION,), header, right, lines, legend, notes.texts)


CAPTION = "Pairs of choices with all else equal, of the boards and figures of this page."


def csv(contrasts: Sequence[Row]) -> str:
    """One line a contrast and board."""
    header = ("contrast", "first", "first value", "second", "second value", "metric", "difference", "interval")
    lines = (
        (
            row.name, row.choices[0], row.values[0].value, row.choices[1], row.values[1].value, row.metric,
            row.difference, row.interval, row.of, row.better, row.place, row.values[0].record, row.values[1].record,
        )
        for row in contrasts
    )  # fmt: skip
    more = ("difference of", "better", "where", "first record", "second record")
    return tables.csv_text((*header, *more), lines)
