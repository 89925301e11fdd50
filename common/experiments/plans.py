"""A plan, made once: what every number, board point and figure of the chosen papers runs, stored in the results folder.

`prunelab plan`, the workflow, its jobs and the page read the same plan. It is made anew where anything that planning
reads has changed: files of this project, settings, and what of the outside world is here. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from prunelab.common.catalogue import lookup
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT
from prunelab.common.experiments import papers, planning
from prunelab.common.experiments.derived import Derived, behind
from prunelab.common.experiments.planning import BoardPoint, Cell, FigureRun
from prunelab.common.experiments.run import FIELDS, Run

FOLDER = "plans"  # in the results folder
FORMAT = 4
_ELSEWHERE = ("results", "batch")  # settings that decide nothing of a plan


class Outcome(NamedTuple):
    """What becomes of one number: addresses of its runs, or alone what they need in words, by scale; why nothing here
    can run it (of `schema.REASONS`); under which assumption it runs."""

    runs: Mapping[str, tuple[str, ...]]
    reason: str
    assumes: str


@dataclass(frozen=True)
class Plan:
    """content: as it is stored, in plain values. A run stands in it once, and is named by its address elsewhere."""

    config: Mapping[str, Any]
    content: Mapping[str, Any]

    @cached_property
    def runs(self) -> Mapping[str, Run]:
        """Every run by its address, those that cannot be made here among them."""
        return {address: _run(address, entry) for address, entry in self.content["runs"].items()}

    @property
    def slugs(self) -> list[str]:
        """The papers."""
        return list(self.content["papers"])

    def cells(self, slug: str) -> list[Cell]:
        """Every reported number of a paper with its runs."""
        tables = {table.name: table for table in papers.load(slug).tables}
        results = []
        for number, entry in zip(papers.reported(slug), self.content["papers"][slug]["cells"], strict=True):
            metric, status, runs, count, reason, assumes = entry
            column = None if reason else tables[number.table].column(number)
            at = {scale: self._made(run) for scale, run in runs.items()}
            own = self.runs[count] if count else None
            results.append(Cell(number, metric, status, column, at, own, reason, assumes))
        return results

    def points(self, slug: str) -> list[BoardPoint]:
        """Every point of a paper's boards."""
        boards = papers.load(slug).boards
        return [
            BoardPoint(boards[number], entry, budget, scale, self._named(run), self.runs[full] if full else None)
            for number, entry, budget, scale, run, full in self.content["papers"][slug]["points"]
        ]

    def figures(self, slug: str) -> list[FigureRun]:
        """Every figure of a paper that needs a run."""
        figures = papers.load(slug).figures
        return [
            FigureRun(figures[number], scale, self._named(run))
            for number, scale, run in self.content["papers"][slug]["figures"]
        ]

    def outcomes(self) -> Iterator[Outcome]:
        """What becomes of each number, without reading a paper."""
        for paper in self.content["papers"].values():
            for _, _, runs, _, reason, assumes in paper["cells"]:
                at = {scale: tuple(_addresses(run)) for scale, run in runs.items()}
                yield Outcome(at, reason, assumes)

    def jobs(self) -> dict[str, Run]:
        """The runs that the tables need at the scales asked for and that can be made here, by address."""
        results = Path(self.config["results"])
        wanted = {address: self.runs[address] for address in self.content["jobs"]}
        # A paper-scale record that only the code has left behind is shown as stale, and made anew on request alone.
        made = {path.stem for path in (results / "records").glob("*.json")}
        known = {stem.partition("-")[0] for stem in made}
        old = {a for a, run in wanted.items() if run.scale == "paper" and a not in made and run.identity in known}
        return {address: run for address, run in wanted.items() if address not in old and not run.needs}

    def _made(self, entry: str | Sequence[str] | dict[str, Any]) -> Run | Derived | str:
        return Derived.read(entry, self.runs.__getitem__) if isinstance(entry, dict) else self._named(entry)

    def _named(self, run: str | Sequence[str]) -> Run | str:
        return run if isinstance(run, str) else self.runs[run[0]]


def of(config: Mapping[str, Any]) -> Plan:
    """The plan of a configuration: as stored in its results folder, or made and stored there."""
    settings = {key: value for key, value in config.items() if key not in _ELSEWHERE}
    path = Path(config["results"]) / FOLDER / f"{files.digest(settings)[:20]}.json"
    key = files.digest([FORMAT, settings, _read(), lookup.surroundings(config)])
    with suppress(OSError, ValueError):  # absent or damaged: it is only a copy of what can be made
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("key") == key and content.pop("sum", "") == files.digest(content):
            return Plan(config, content)
    plan = made(config)
    content = {"key": key, **plan.content}
    with suppress(PrunelabError):  # a folder that can only be read
        files.write_text(path, json.dumps({**content, "sum": files.digest(content)}) + "\n")
    return plan


def made(config: Mapping[str, Any]) -> Plan:
    """The plan of a configuration, made and not stored. Raises PrunelabError with the first mistake of a paper."""
    runs: dict[str, Run] = {}
    wanted: dict[str, None] = {}
    scales = planning.scales(config)

    def named(run: Run | str, job: bool = True) -> str | list[str]:
        if isinstance(run, str):
            return run
        runs[run.address] = run
        wanted.update({run.address: None} if job else {})
        return [run.address]

    def made_of(entry: Run | Derived | str, scale: str) -> str | list[str] | dict[str, Any]:
        for run in behind(entry):
            named(run, scale in scales or run.scale == "")
        return entry.stored(lambda run: run.address) if isinstance(entry, Derived) else named(entry, job=False)

    def of_cell(cell: Cell) -> list[Any]:
        at = {scale: made_of(entry, scale) for scale, entry in cell.runs.items()}
        count = named(cell.count)[0] if cell.count else None
        return [cell.metric, cell.status, at, count, cell.reason, cell.assumes]

    def of_paper(slug: str) -> dict[str, Any]:
        paper = papers.load(slug)
        return {
            "cells": [of_cell(cell) for cell in planning.cells(slug, config)],
            "points": [
                [
                    paper.boards.index(p.board),
                    p.entry,
                    p.budget,
                    p.scale,
                    named(p.run),
                    named(p.full, job=False)[0] if p.full else None,
                ]
                for p in planning.points(slug, config)
            ],
            "figures": [[paper.figures.index(f.figure), f.scale, named(f.run)] for f in planning.figures(slug, config)],
        }

    with lookup.unchanging():
        content = {"papers": {slug: of_paper(slug) for slug in planning.selected(config)}}
    stored = {address: {name: getattr(run, name) for name in FIELDS} for address, run in runs.items()}
    return Plan(config, json.loads(json.dumps({**content, "runs": stored, "jobs": list(wanted)})))


def _addresses(entry: str | Sequence[str] | Mapping[str, Any]) -> Iterator[str]:
    """The addresses in what is stored of a number at a scale, or its words alone."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, Mapping):
        for part in entry["of"]:
            yield from _addresses(part) if isinstance(part, Mapping) else part[:1]
    else:
        yield from entry


def _run(address: str, entry: Mapping[str, Any]) -> Run:
    names = tuple((kind, name) for kind, name in entry["names"])
    run = Run(**{**entry, "entries": tuple(entry["entries"]), "names": names})
    vars(run)["identity"], _, vars(run)["sources"] = address.partition("-")  # or else every source is read again
    return run


def _read() -> str:
    """A hash of all of this project that planning reads: texts of papers, catalogues, and the code behind addresses."""
    patterns = ("common/**/*.py", "configs/**/*.yaml", "common/testbeds/weights/*/training.json")
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    paths += [p for p in papers.METHODS.glob("*/*") if p.suffix in (".py", ".yaml", ".csv")]
    return files.digest({str(path): files.file_digest(path) for path in sorted(paths)})
