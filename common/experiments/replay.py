"""`python -m prunelab replay RECORD`: run again exactly what a record tells of, and compare metric by metric.

With the same libraries, machine, device and threads every number must come out the same, bit for bit. Elsewhere sums
are rounded in another order, so that a number may differ by a relative tolerance or a tenth of its own standard error.
What a clock measured is shown and not judged.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from prunelab.common import tasks
from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import name_fault
from prunelab.common.experiments import provenance, runner
from prunelab.common.experiments.run import Run

TOLERANCE = 1e-3  # relative
OF_STDERR = 0.1
ROUNDING = ("python", "machine", "device", "dtype", "threads")  # of an environment, beside its libraries
NAMES = ("hub", "package", "file", "folder", "assets", "testbed", "setting", "test", "train", "images", "annotations")
Verdict = Literal["equal", "within", "off", "missing", "timed"]


@dataclass(frozen=True)
class Compared:
    """A metric of the record beside the replayed one; None where one side lacks it."""

    metric: str
    recorded: Any
    replayed: Any
    verdict: Verdict


def read(path: Path) -> dict[str, Any]:
    """A record, verified: its checksum, its name, and that its run is the one its identity names."""
    if not path.is_file():
        raise PrunelabError(f"there is no record {path}; give a JSON file of results/records")
    if not re.fullmatch(r"[0-9a-f]{20}-[0-9a-f]{12}\.json", path.name):
        raise PrunelabError(f"{path} is no run record; give a JSON file of results/records")
    record = provenance.read(path)
    try:
        run = run_of(record)
    except (KeyError, TypeError):
        raise PrunelabError(f"the run record {path} is of another version of Prunelab; make it anew") from None
    _refuse_strangers(path, run)
    if run.identity != record["identity"]:
        raise PrunelabError(f"the run record {path} does not tell of the run that its identity names; make it anew")
    return record


def _refuse_strangers(path: Path, run: Run) -> None:
    """A checksum is no signature: what a record makes us import or open must be of this project and its folders."""
    call = str(run.settings.get("call", "prunelab.methods.x.tables:x"))
    if run.task not in tasks.names() or not re.fullmatch(r"prunelab\.methods\.\w+\.\w+:\w+", call):
        raise PrunelabError(f"the run record {path} asks for {run.task} {call}, which is nothing of Prunelab's")
    for ids in run.ids.values():
        for key, value in ids.items() if isinstance(ids, Mapping) else ():
            fault = name_fault(value) if key in NAMES and isinstance(value, str) else None
            if fault:
                raise PrunelabError(f"the run record {path} asks for {key} {value!r}, which {fault}")


def run_of(record: Mapping[str, Any]) -> Run:
    """The run that a record tells of."""
    known = {field.name for field in fields(Run)}
    stored = {key: value for key, value in record["run"].items() if key in known}
    return Run(**{**stored, "entries": tuple(stored["entries"]), "needs": "", "names": ()})


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two environments may change sums in their last digits, in words."""
    results = [f"{key} {then.get(key)}, here {now.get(key)}" for key in ROUNDING if then.get(key) != now.get(key)]
    before, here = then.get("libraries", {}), now.get("libraries", {})
    for name in dict.fromkeys((*before, *here)):
        if before.get(name) != here.get(name):
            results.append(f"{name} {before.get(name, 'none')}, here {here.get(name, 'none')}")
    return results


def changed(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What of the run itself is another today: its sources, its weights or its data, in words."""
    run = run_of(record)
    results = []
    if run.sources != record["sources"]:
        made = record["environment"].get("commit") or "an unknown commit"
        results.append(f"the sources (the record was made at {made[:12]})")
    results += [
        f"the {part}" for part, ids in run.ids.items() if isinstance(ids, Mapping) and lookup.moved(ids, config)
    ]
    return results


def compare(
    task: str, recorded: Mapping[str, Any], replayed: Mapping[str, Any], tolerance: float | None
) -> list[Compared]:
    """Every metric of both sides. tolerance: relative; None asks for equality, of samples and errors as well."""
    known, result = tasks.get(task).metrics, []
    for name in dict.fromkeys((*recorded, *replayed)):
        before, after = recorded.get(name), replayed.get(name)
        if before is None or after is None:
            verdict: Verdict = "missing"
        elif name in known and known[name].timed:
            verdict = "timed"
        elif before == after:
            verdict = "equal"
        else:
            verdict = "within" if tolerance is not None and _near(before, after, tolerance) else "off"
        result.append(Compared(name, _shown(before), _shown(after), verdict))
    return result


def _near(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> bool:
    a, b = before.get("value"), after.get("value")
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return before.get("text") == after.get("text") and a == b
    return abs(a - b) <= max(tolerance * abs(a), OF_STDERR * float(before.get("stderr") or 0.0))


def _shown(metric: Any) -> Any:
    return metric.get("value", metric.get("text")) if isinstance(metric, Mapping) else metric


def run(
    path: Path, config: Mapping[str, Any], console: Console, *, tolerance: float = TOLERANCE, force: bool = False
) -> bool:
    """Replay a record and show both sides; whether every metric came out as it was."""
    record = read(path)
    original = run_of(record)
    other = changed(record, config)
    if other and not force:
        raise PrunelabError(
            f"{' and '.join(other)} changed since {path.name} was made; check out its commit, or compare with --force"
        )
    for what in other:
        console.print(f"differs: {what} changed", markup=False, soft_wrap=True)
    made = again(original, config, record["environment"].get("threads"))
    elsewhere = differences(record["environment"], made["environment"])
    for line in elsewhere:
        console.print(f"differs: {line}", markup=False, soft_wrap=True)
    exact = not other and not elsewhere
    compared = compare(original.task, record["metrics"], made["metrics"], None if exact else tolerance)
    strictness = "bit for bit" if exact else f"relative {tolerance:g}, or a tenth of its standard error"
    table = Table(
        "metric",
        "recorded",
        "replayed",
        "verdict",
        title=f"{original.method or 'unpruned'}, {original.task}; {strictness}",
    )
    for each in compared:
        table.add_row(each.metric, f"{each.recorded}", f"{each.replayed}", each.verdict)
    console.print(table)
    return not any(each.verdict in ("off", "missing") for each in compared)


def again(original: Run, config: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
    """The record of a run made anew with so many threads, in a temporary folder."""
    import torch

    before, held = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads or before)
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = runner.execute(original, {**config, "results": folder})
            return provenance.read(made)
    finally:
        torch.set_num_threads(before)
        if held is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = held
