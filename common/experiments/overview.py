"""How far the tables are: the runs that they need, those that are there, and what the other numbers lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunelab.common.experiments import planning
from prunelab.common.experiments.run import Run


@dataclass(frozen=True)
class Overview:
    """runs: by kind and scale, how many are needed and how many have a record. reported: how many numbers the papers
    report, made: how many of them the runs make. lacking: what the others need, with how many numbers need it.
    reasons: why nothing here can run some of them, of `papers.REASONS`."""

    runs: Mapping[tuple[str, str], tuple[int, int]]
    reported: int
    made: int
    lacking: Counter[str]
    reasons: Counter[str]


def overview(config: Mapping[str, Any]) -> Overview:
    """Of the papers and scales of a configuration. Reads which records are there, and runs nothing."""
    jobs, results = planning.jobs(config), Path(config["results"])
    needed: Counter[tuple[str, str]] = Counter((run.task, run.scale) for run in jobs.values())
    there = Counter((run.task, run.scale) for run in jobs.values() if run.path(results).exists())
    reported = made = 0
    lacking: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for slug in planning.selected(config):
        for cell in planning.cells(slug, config):
            reported += 1
            reasons.update([cell.reason] if cell.reason else [])
            if any(isinstance(run, Run) and run.address in jobs for run in cell.runs.values()):
                made += 1
            else:
                run = cell.runs["paper"]
                needs = run if isinstance(run, str) else run.needs
                lacking[needs or "its record made anew: only the code has changed since"] += 1
    return Overview({key: (needed[key], there[key]) for key in sorted(needed)}, reported, made, lacking, reasons)
