"""The join: every reported number beside what we obtained, with how it was obtained or what it needs.

Tables read only reported.csv and run records. Nothing is computed here but differences and intervals.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from prunelab.common import tasks
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import forecast, papers, planning, provenance, replay, schema
from prunelab.common.experiments.derived import FINITE, Derived
from prunelab.common.experiments.plans import Plan
from prunelab.common.experiments.run import Run
from prunelab.common.metrics import uncertainty
from prunelab.paper_tables import tolerance
from prunelab.paper_tables.tolerance import Tolerance

ON_REQUEST = "--config scale=paper; the data are at hand"
MISSING = "its record, which snakemake paper_tables makes"
EXACT = "not needed: what this row runs is exact at paper scale"
KEPT = Path(__file__).parent / "kept"  # records of runs with the samples that decide a board
KEPT_SHARE = "kept"  # the metric of tasks that ask a model whose tokens are pruned
UNKEPT = "its run with all samples (--config samples=full), which no record is kept of"
FOLDER = "own folder"  # scale of what ran on a folder of the user's in the place of the published files
UNPUBLISHED = "the published files, which a folder of yours stands in for (--config hub)"
Z95 = 1.96

Outcome = Literal["within", "off", "assumed", "stale", "ready", "stand-in", "not run"]
GPU = "h200"  # that the page foretells times for


@dataclass(frozen=True)
class Count:
    """Our own count of a cost, in G multiply-adds: with the method's scoring, and the scoring in it; and what a
    decoder's key-value cache then holds, in MiB."""

    gmacs: float
    scoring: float
    record: str
    cache: float | None = None
    protocol: str = ""


@dataclass(frozen=True)
class Value:
    """What one scale gives for a cell. status: measured, analytic, stale, the scale of a stand-in, or, where there is
    no value, `not run: ...` or `not needed: ...`."""

    status: str
    value: float | None = None
    stderr: float | None = None
    samples: int | None = None
    record: str | None = None
    ours: Count | None = None  # for a cost
    protocol: str = ""  # what the number depends on and papers differ in, in words
    kept: float | None = None  # percent of the tokens that a layer saw of what was pruned, where the run tells it

    @property
    def needs(self) -> str:
        """What it would take, where there is no value."""
        return "" if self.value is not None else self.status.partition(": ")[2].removeprefix("needs ")

    @property
    def margin(self) -> float | None:
        """Half width of the 95 % confidence interval, where the record has a standard error."""
        return None if self.stderr is None else Z95 * self.stderr


@dataclass(frozen=True)
class Line:
    """A reported number with its reproduction at paper scale and its stand-ins, by scale."""

    reported: schema.Reported
    reproduced: Value
    difference: float | None
    within: bool | None  # inside the tolerance; None where nothing was reproduced, or under an assumption
    tolerance: Tolerance | None  # None where nothing here can make the number
    others: Mapping[str, Value]  # one entry for every other scale asked for
    reason: str = ""  # why nothing here can run it, of `schema.REASONS`
    assumes: str = ""  # under which assumption it runs
    ready: str = ""  # the command that makes it and what that takes, where a run waits for a GPU or a download

    @property
    def outcome(self) -> Outcome:
        """The line in one word; a stand-in never counts as reproduced."""
        if self.reproduced.status == "stale":
            return "stale"
        if self.reproduced.value is not None and self.assumes:
            return "assumed"
        if self.within is not None:
            return "within" if self.within else "off"
        if self.ready:
            return "ready"
        return "stand-in" if any(v.value is not None for v in self.others.values()) else "not run"


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper."""

    name: str
    caption: str
    note: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Point:
    """One point of a board. difference and interval are paired with the baseline over the same samples."""

    entry: str
    budget: str | None
    scale: str
    value: Value
    cost: float | None = None
    saving: float | None = None
    difference: float | None = None
    interval: float | None = None


@dataclass(frozen=True)
class BoardTable:
    """One comparison of our own at one scale; the first point is the unpruned baseline."""

    name: str
    caption: str
    metric: str  # in words
    scale: str  # or "analytic", for what follows from shapes
    cost: str  # in words
    points: tuple[Point, ...]
    board: schema.Board  # as paper.yaml states it

    @property
    def costed(self) -> bool:
        """Whether any point has a cost; samplers and decoders have none beside their metric."""
        return any(p.cost is not None for p in self.points)


class Records:
    """Verified run records of one results folder."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self._read: dict[Path, dict[str, Any]] = {}

    @cached_property
    def _older(self) -> Mapping[str, Path]:
        """A record of each identity, whatever sources made it."""
        results: dict[str, Path] = {}
        for path in sorted((self.results / "records").glob("*.json")):
            results.setdefault(path.stem.partition("-")[0], path)
        return results

    def get(self, run: Run) -> tuple[dict[str, Any] | None, bool]:
        """The run's record and whether it is stale; (None, False) where there is none."""
        path = run.path(self.results)
        old = False
        if not path.exists():
            result = self._older.get(run.identity) if run.scale == "paper" else None
            if result is None:
                return None, False
            path, old = result, True
        return self._at(path), old

    def at(self, address: str) -> dict[str, Any]:
        """A record by its address."""
        return self._at(self.place(address))

    def place(self, address: str) -> Path:
        """Where a record lies, made here or kept."""
        path = self.results / "records" / f"{address}.json"
        if not path.exists():
            path = KEPT / path.name
        if not path.exists():
            raise PrunelabError(f"there is no record {address} in {self.results}")
        return path

    @cached_property
    def _kept(self) -> Mapping[str, dict[str, Any]]:
        """The kept records by what they ran."""
        return {replay.run_of(record).likeness: record for record in map(self._at, sorted(KEPT.glob("*.json")))}

    def kept(self, run: Run | None) -> tuple[dict[str, Any], str] | None:
        """The kept record of a run, whatever sources, weights and versions of data made it, with a note in words that
        tells of them; None where none is kept."""
        record = self._kept.get(run.likeness) if run else None
        if run is None or record is None:
            return None
        commit, day = record["environment"].get("commit"), datetime.fromtimestamp(record["timing"]["started"], UTC)
        changed = [
            name
            for name, same in (
                ("sources", record["sources"] == run.sources),
                # what is not at hand here cannot be compared
                ("versions of model or data", bool(run.needs) or record["identity"] == run.identity),
            )
            if not same
        ]
        since = f"its {' and '.join(changed)} have changed since" if changed else "by the sources of today"
        return record, f"kept record, made at revision {(commit or 'unknown')[:12]} on {day:%Y-%m-%d}; {since}"

    def _at(self, path: Path) -> dict[str, Any]:
        if path not in self._read:
            self._read[path] = provenance.read(path)
        return self._read[path]

    def count(self, run: Run) -> Count | None:
        """Our own count of a cost, of a run whose task makes one."""
        record, _ = self.get(run)
        names = tasks.get(run.task).count
        if record is None or not names or not set(names) <= record["metrics"].keys():
            return None
        macs, scoring, *cache = (record["metrics"][name] for name in names)
        address = f"{record['identity']}-{record['sources']}"
        held = cache[0]["value"] if cache else None
        return Count(macs["value"], scoring["value"], address, held, macs.get("protocol", ""))

    def value(self, run: Run | Derived | str, metric: str, status: str) -> Value:
        """A cell's value, or the reason why there is none."""
        if isinstance(run, Derived):
            return self._derived(run, status)
        if isinstance(run, str):
            nothing = run.removeprefix("nothing: ")
            return Value(f"not run: {nothing}" if nothing != run else f"not run: needs {run}")
        record, old = self.get(run)
        if record is None:
            return Value(f"not run: needs {run.needs or (ON_REQUEST if run.scale == 'paper' else MISSING)}")
        if metric not in record["metrics"]:
            return Value(f"not run: needs the metric '{metric}', which the record {run.address} lacks")
        result = record["metrics"][metric]
        address = f"{record['identity']}-{record['sources']}"
        protocol = result.get("protocol", "")
        status = "stale" if old else status
        n, error, left = result.get("n"), result.get("stderr"), seen(record, metric)
        return Value(status, result["value"], error, n, address, self.count(run), protocol, left)

    def _derived(self, made: Derived, status: str) -> Value:
        """A value that is made of those of several runs; what one of them lacks, it lacks."""
        found = {(run.address, metric): self.value(run, metric, status) for run, metric in made.leaves()}
        if lacking := next((value for value in found.values() if value.value is None), None):
            return lacking

        def read(run: Run, metric: str) -> tuple[float, float | None]:
            result = found[run.address, metric]
            assert result.value is not None
            return result.value, result.stderr

        value, error = made.value(read)
        if not math.isfinite(value):
            return Value(f"not run: needs {FINITE}")
        old = any(each.status == "stale" for each in found.values())
        runs = ", ".join(dict.fromkeys(str(each.record) for each in found.values()))
        return Value("stale" if old else status, value, error, protocol=f"{made.words}, of the runs {runs}")


def tables(slug: str, plan: Plan, records: Records, outlook: forecast.Outlook | None = None) -> list[PaperTable]:
    """Every reported table of a paper, line by line. outlook: that of the plan, where several papers share it."""
    config, paper = plan.config, papers.load(slug)
    outlook = outlook or forecast.Outlook(plan, forecast.gpu(GPU))
    lines: dict[str, list[Line]] = {}
    for cell in plan.cells(slug):
        runs = dict(cell.runs)
        at_paper_scale = runs.pop("paper", ON_REQUEST)
        reproduced = records.value(at_paper_scale, cell.metric, cell.status)
        if cell.count:
            reproduced = replace(reproduced, ours=records.count(cell.count))
        others = {scale: records.value(run, cell.metric, scale) for scale, run in runs.items()}
        for scale in planning.scales(config):
            if scale != "paper" and scale not in others:  # an exact number has no stand-in, nor has what nothing runs
                others[scale] = reproduced if isinstance(at_paper_scale, str) else Value(EXACT)
        if config["hub"]:
            others[FOLDER] = Value(EXACT)
        if not isinstance(at_paper_scale, str) and at_paper_scale.stand_in and reproduced.value is not None:
            others[FOLDER], reproduced = reproduced, Value(f"not run: needs {UNPUBLISHED}")
        difference = within = None
        allowed = tolerance.of(cell, reproduced.stderr, reproduced.samples)
        if reproduced.value is not None and allowed:
            difference = reproduced.value - cell.reported.value
            within = None if cell.assumes else allowed.allows(difference)
        ready = outlook.note(slug, cell) if reproduced.value is None else ""
        lines.setdefault(cell.reported.table, []).append(
            Line(cell.reported, reproduced, difference, within, allowed, others, cell.reason, cell.assumes, ready)
        )
    described = {table.name: table for table in paper.tables}
    return [PaperTable(n, described[n].caption, described[n].note, tuple(rows)) for n, rows in lines.items()]


def boards(slug: str, plan: Plan, records: Records) -> list[BoardTable]:
    """Every board of a paper at every scale that ran."""
    groups: dict[tuple[str, str], list[planning.BoardPoint]] = {}
    for point in plan.points(slug):
        groups.setdefault((point.board.name, point.scale), []).append(point)
    return [_board(points, records) for points in groups.values()]


def saving(cost: str) -> str:
    """The metric of what is saved of a cost, which is named alike."""
    return re.sub("g?(macs|parameters|bytes)$", "saving", cost)


def seen(record: Mapping[str, Any], metric: str) -> float | None:
    """What a run of a method really kept, beside another of its metrics: papers' budgets mean different things."""
    if metric == KEPT_SHARE or record["run"]["method"] is None:
        return None
    found: float | None = record["metrics"].get(KEPT_SHARE, {}).get("value")
    return found


def of_kept(record: Mapping[str, Any], note: str, metric: str, status: str) -> Value:
    """The value of a kept record, which says that it is one."""
    result = record["metrics"].get(metric)
    if result is None:
        return Value(f"not run: needs {UNKEPT}")
    protocol = "; ".join(part for part in (result.get("protocol", ""), note) if part)
    address = f"{record['identity']}-{record['sources']}"
    n, error, left = result.get("n"), result.get("stderr"), seen(record, metric)
    return Value(status, result["value"], error, n, address, None, protocol, left)


def _board(points: list[planning.BoardPoint], records: Records) -> BoardTable:
    board = points[0].board
    task = tasks.get(board.task)
    scale = points[0].scale if task.scales else task.status
    if task.scales and any(isinstance(p.run, Run) and p.run.stand_in for p in points):
        scale = FOLDER
    kept = records.kept(points[0].full) is not None  # then the board is of those alone, as samples must be the same

    def found(point: planning.BoardPoint) -> tuple[dict[str, Any] | None, Value]:
        if not kept:
            own = records.get(point.run)[0] if isinstance(point.run, Run) else None
            return own, records.value(point.run, board.metric, scale)
        last = records.kept(point.full)
        return (last[0], of_kept(*last, board.metric, scale)) if last else (None, Value(f"not run: needs {UNKEPT}"))

    base = found(points[0])[0]
    rows = []
    for point in points:
        record, value = found(point)
        if record is None or board.metric not in record["metrics"]:
            rows.append(Point(point.entry, point.budget, scale, value))
            continue
        figures = record["metrics"]
        paired = None
        if point is not points[0] and base and board.metric in base["metrics"]:
            paired = uncertainty.paired_difference(figures[board.metric], base["metrics"][board.metric])
        rows.append(
            Point(
                point.entry,
                point.budget,
                scale,
                value,
                figures.get(board.cost, {}).get("value"),
                figures.get(saving(board.cost), {}).get("value"),
                *(paired or (None, None)),
            )
        )
    return BoardTable(
        board.name, board.caption, board.label or board.metric, scale, board.cost_label, tuple(rows), board
    )
