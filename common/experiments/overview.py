"""How far the tables are: the runs that they need, those that are there, and what the other numbers lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunelab.common.experiments import plans

UNSAID = "unsaid"


@dataclass(frozen=True)
class Overview:
    """runs: by kind and scale, how many are needed and how many have a record. reported: how many numbers the papers
    report, executable: how many of them have a run at paper scale or one that needs no scale, whatever it lacks here,
    assumed: how many of those run under an assumption; reasons: why the others have none, of `schema.REASONS`, or
    `unsaid`, which is a mistake in a paper.yaml. made:
    how many the runs make. lacking: what the others need, with how many numbers need it."""

    runs: Mapping[tuple[str, str], tuple[int, int]]
    reported: int
    executable: int
    assumed: int
    made: int
    lacking: Counter[str]
    reasons: Counter[str]


def overview(config: Mapping[str, Any]) -> Overview:
    """Of the papers and scales of a configuration. Reads which records are there, and runs nothing."""
    plan = plans.of(config)
    jobs = plan.jobs()
    records = {path.stem for path in (Path(config["results"]) / "records").glob("*.json")}
    needed = Counter((run.task, run.scale) for run in jobs.values())
    made = Counter((run.task, run.scale) for address, run in jobs.items() if address in records)
    numbers = list(plan.outcomes())
    lacking: Counter[str] = Counter()
    for number in numbers:
        if not any(jobs.keys() >= set(at) for at in number.runs.values()):
            at = number.runs["paper"]
            needs = next((plan.runs[one].needs if one in plan.runs else one for one in at if one not in jobs), "")
            lacking[needs or "its record made anew: only the code has changed since"] += 1
    ready = [plan.runs.keys() >= set(number.runs["paper"]) for number in numbers]
    return Overview(
        {key: (needed[key], made[key]) for key in sorted(needed)},
        len(numbers),
        sum(ready),
        sum(bool(number.assumes) for number, there in zip(numbers, ready, strict=True) if there),
        len(numbers) - lacking.total(),
        lacking,
        Counter(number.reason or UNSAID for number, there in zip(numbers, ready, strict=True) if not there),
    )
