"""What runs at paper scale will take of a GPU: hours, memory, download, licences. From shapes; imports no torch.

The time of a run is that of its multiply-adds, two operations a used parameter and token that is read, six where it is
trained on, and the encoder's beside them, through a stated share of the GPU's peak; and of its decoding, each step of
which reads all weights once through a stated share of the memory's bandwidth. A second model's look at single pictures
counts besides. Where runs of a task were measured on
such a GPU, their records correct it. A method's saving is left out: the time is that of the unpruned model.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from prunelab.common import tasks
from prunelab.common.catalogue import lookup, sizes
from prunelab.common.catalogue.evaluation_sets import evaluation_sets
from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.registry import choose
from prunelab.common.experiments.derived import Derived, behind
from prunelab.common.experiments.planning import Cell
from prunelab.common.experiments.plans import Plan
from prunelab.common.experiments.run import Run
from prunelab.common.experiments.schema import Reported
from prunelab.common.tasks.base import Work

COMPUTED, READ = 0.35, 0.6  # shares of peak operations and of peak bandwidth that runs like these reach
LOADED = 1.5  # GB a second of weights, from disk to GPU
BEGUN = 40.0  # seconds until a process computes
AROUND = 1.15  # memory for activations, and what the allocator holds beside weights and cache
ASKED = 64  # tokens of what a second model is asked of a picture, as it is told
HELD = 2048  # tokens of a sequence, where the task says nothing of them


@dataclass(frozen=True)
class Gpu:
    """As its vendor states it. tflops: dense, in bfloat16. tbs: TB a second. gb: of memory, in 1e9 bytes."""

    name: str
    tflops: float
    tbs: float
    gb: float


GPUS = {
    "h200": Gpu("H200", 989, 4.8, 141),
    "h100": Gpu("H100", 989, 3.35, 80),
    "a100": Gpu("A100", 312, 2.04, 80),
    "a6000": Gpu("RTX A6000", 155, 0.77, 48),
    "rtx4090": Gpu("GeForce RTX 4090", 165, 1.01, 24),
    "rtx3090": Gpu("GeForce RTX 3090", 71, 0.94, 24),
}


def gpu(name: str) -> Gpu:
    """The GPU of that name. Raises PrunelabError where it is not listed."""
    result: Gpu = choose(GPUS, name.lower(), "GPU")
    return result


@dataclass(frozen=True)
class Forecast:
    """What a run takes. hours: of GPUs, all that it holds; None where nothing tells how much it has to do. memory: in
    GB, of each GPU. gpus: that hold it; more than the catalogue says where its memory asks for them."""

    hours: float | None
    memory: float
    gpus: int
    computes: bool = True

    @property
    def note(self) -> str:
        """In words."""
        if not self.computes:
            return "no GPU"
        time = "hours unknown" if self.hours is None else f"{shown(self.hours)} GPU hours"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} with {self.memory:.3g} GB, {time}"


def shown(hours: float) -> str:
    """Hours as told: no finer than the foretelling is."""
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def work(run: Run) -> Work | None:
    """What a run gives its model to do, by its task."""
    task = tasks.get(run.task)
    data = [name for kind, name in run.names if kind == "dataset"]
    held = next((_size(name) for name in data), None)
    counts = {name: _questions(name) for name in run.settings.get("tasks", ())} if "own data" in task.reads else {}
    settings = dict(run.settings)
    if run.method is None and "calibration" in task.reads:
        settings["calibration"] = 0
    return task.work(task.read(settings), counts, held)


def _size(name: str) -> int | None:
    if name in evaluation_sets():
        return evaluation_sets()[name].size
    result: int | None = lookup.dataset(name).get("paper", {}).get("size")
    return result


def _questions(task: str) -> int | None:
    """Questions of a task of an evaluation library, or of the data set that it reads."""
    if task in evaluation_sets():
        return evaluation_sets()[task].size
    known = [_size(name) for name in lookup.of_tasks([task])]
    return next((n for n in known if n), None)


def of(run: Run, card: Gpu, corrections: Mapping[str, float] | None = None) -> Forecast:
    """What a run takes of such GPUs."""
    if run.scale != "paper" and not tasks.get(run.task).needs_gpu:
        return Forecast(0.0, 0.0, 0, computes=False)
    used = dict(zip(run.ids, run.names, strict=False))  # in one order; `processor` lends files, and no weights
    names = [name for of, (kind, name) in used.items() if kind == "model" and of != "processor"]
    weighed = [known for name in names if (known := sizes.of(name))]
    done = work(run)
    if not names and "model" not in run.ids and "weights" not in tasks.get(run.task).reads:
        return Forecast(done.seconds / 3600 if done else 0.0, 0.0, 1, computes=tasks.get(run.task).needs_gpu)
    model = weighed[0] if weighed else sizes.Sizes(0, 0, 0)
    weights = sum(each.gbytes for each in weighed)
    done_or_none = done or Work()
    visual = done_or_none.frames * model.frame_tokens if done_or_none.frames else model.input_tokens
    cache = done_or_none.together * (HELD + visual) * model.cache / 1e9
    memory = AROUND * (weights * (8 if done_or_none.whole else 1) + cache)
    gpus = 1 if _undivided(run) else max(run.gpus, -int(-memory // card.gb) if memory > card.gb else 1)
    if done is None or (names and not weighed):
        return Forecast(None, memory / gpus, gpus)
    encoder = 1e9 * (done.frames * model.frame_gmacs if done.frames else model.input_gmacs)
    macs = done.inputs * (encoder + model.active * visual) + model.active * (done.read + 3 * done.trained)
    second = sizes.of(used["frame_scores"][1]) if "frame_scores" in used else None
    if second:
        macs += done.looked * (1e9 * second.input_gmacs + second.active * (second.input_tokens + ASKED))
    steps = done.written / done.together
    busy = 2 * macs / (card.tflops * 1e12 * COMPUTED) + steps * weights / (1e3 * card.tbs * READ)
    if not names and "model" in run.ids:  # an architecture with random weights
        busy = 0.0
    seconds = BEGUN + weights / LOADED + busy + done.seconds
    return Forecast(seconds * gpus * (corrections or {}).get(run.task, 1.0) / 3600, memory / gpus, gpus)


def _undivided(run: Run) -> bool:
    """Whether one GPU must hold all of a run's model: pruning refuses weights that are spread over several."""
    return run.method is not None and registry.entry(run.method).role == "weight_pruner"


def check_fits(run: Run, memory: float) -> None:
    """Raises PrunelabError where a run takes more than the GPUs at hand have together, in GB: it would fail when it has
    loaded what it can. What is held beside weights and cache is only an estimate, and no reason to refuse."""
    foretold = of(run, Gpu("this GPU", 1.0, 1.0, memory))
    least = foretold.memory * foretold.gpus / AROUND
    if least > memory and _undivided(run):
        raise PrunelabError(
            f"this run takes {least:.0f} GB for weights and cache, and its GPU has {memory:.0f} GB; weights are"
            " pruned on one GPU, so give it a larger one"
        )
    if least > memory:
        raise PrunelabError(
            f"this run takes {least:.0f} GB for weights and cache, and its GPUs have {memory:.0f} GB; give it more of"
            " them (`gpus` of the model in configs/models.yaml), or larger ones"
        )


def corrections(runs: Iterable[Run], results: Path, card: Gpu) -> dict[str, float]:
    """Of each task what its runs took on such a GPU by what was foretold, in the median; tasks that no record of such a
    GPU tells of are left out."""
    ratios: dict[str, list[float]] = {}
    known = {run.identity: run for run in runs if run.scale == "paper"}
    for path in (results / "records").glob("*.json"):
        run = known.get(path.stem.partition("-")[0])
        if run is None:
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        foretold = of(run, card).hours
        if card.name in str(record["environment"].get("device")) and foretold:
            ratios.setdefault(run.task, []).append(record["timing"]["seconds"] * run.gpus / 3600 / foretold)
    return {task: statistics.median(values) for task, values in ratios.items()}


class Waiting(NamedTuple):
    """A number that runs would make, with those that it still lacks."""

    slug: str
    lacks: tuple[Run, ...]
    number: Reported


class Outlook:
    """What a plan still lacks at paper scale, and what it takes on GPUs of a kind."""

    def __init__(self, plan: Plan, card: Gpu) -> None:
        results = Path(plan.config["results"])
        self._made = {path.stem.partition("-")[0] for path in (results / "records").glob("*.json")}
        self._plan, self._card = plan, card
        self._corrections = corrections(plan.runs.values(), results, card)

    @cached_property
    def waiting(self) -> list[Waiting]:
        """Numbers that runs would make."""
        cells = ((slug, cell) for slug in self._plan.slugs for cell in self._plan.cells(slug))
        return [
            Waiting(slug, lacks, cell.reported)
            for slug, cell in cells
            if (lacks := waiting(cell.runs.get("paper"), self._made))
        ]

    def note(self, slug: str, cell: Cell) -> str:
        """How a number that waits is made, and what that takes; '' of one that does not wait."""
        lacks = waiting(cell.runs.get("paper"), self._made)
        if not lacks:
            return ""
        number = cell.reported
        names = " ".join(shlex.quote(name) for name in (slug, number.table, number.row))
        files = _files(lacks)
        size = sum(entry.get("gb") or 0 for entry in files.values())
        parts = [
            f"ready: python -m prunelab run {names} --column {shlex.quote(number.column)} --config scale=paper",
            f"takes {'; '.join(dict.fromkeys(self.of(run).note for run in lacks))} ({self._card.name})",
        ]
        if files:
            licences = "; ".join(f"{name} ({_terms(entry)})" for name, entry in files.items())
            parts.append(f"{size:.3g} GB or more by python -m prunelab prefetch --lock of {licences}")
        return "; ".join(parts)

    def of(self, run: Run) -> Forecast:
        """Of one run."""
        return of(run, self._card, self._corrections)

    def fitting(self, hours: float) -> list[Waiting]:
        """Those that wait and fit into so many hours of one GPU together: runs that make most numbers an hour first."""
        makes = Counter(run.identity for _, lacks, _ in self.waiting for run in lacks)
        foretold = {run.identity: self.of(run) for _, lacks, _ in self.waiting for run in lacks}
        able = {
            name: f.hours
            for name, f in foretold.items()
            if f.hours is not None and f.gpus <= 1 and f.memory <= self._card.gb
        }
        needed = [frozenset(run.identity for run in lacks) for _, lacks, _ in self.waiting]
        possible = {names for names in needed if names <= able.keys()}
        chosen, left = set[str](), hours
        for names in sorted(possible, key=lambda n: (max(able[name] / makes[name] for name in n), sorted(n))):
            more = sum(able[name] for name in names - chosen)
            if more <= left:
                chosen |= names
                left -= more
        return [number for number, names in zip(self.waiting, needed, strict=True) if names <= chosen]

    def total(self, numbers: Sequence[Sequence[Run]]) -> dict[str, Any]:
        """Of the runs behind numbers, each counted once: hours, runs whose hours nothing tells, GB that the largest
        takes of each of its GPUs, GB of files, and the licences and gates to be accepted."""
        runs = {run.identity: run for lacks in numbers for run in lacks}.values()
        foretold = [self.of(run) for run in runs]
        files = _files(runs)
        return {
            "numbers": len(numbers),
            "runs": len(runs),
            "gpu_hours": round(sum(f.hours or 0 for f in foretold), 2),
            "hours_unknown": sum(f.hours is None for f in foretold),
            "gpus": max((f.gpus for f in foretold), default=0),
            "memory_gb": round(max((f.memory for f in foretold), default=0), 1),
            "download_gb": round(sum(entry.get("gb") or 0 for entry in files.values()), 1),
            "download_unknown": sum("hub" in entry and not entry.get("gb") for entry in files.values()),
            "licences": sorted({entry["licence"] for entry in files.values() if entry.get("licence")}),
            "gated": sorted({entry["hub"] for entry in files.values() if entry.get("gated")}),
        }


def waiting(entry: Run | Derived | str | None, made: Container[str]) -> tuple[Run, ...]:
    """The runs of a number that are ready and no more: those without a record of any sources, at paper scale or for a
    GPU."""
    return tuple(
        run
        for run in behind(entry)
        if run.identity not in made and (run.scale == "paper" or tasks.get(run.task).needs_gpu)
    )


def command(slugs: Iterable[str]) -> str:
    """What makes the numbers of these papers where a GPU is."""
    return f"snakemake paper_tables --profile configs/profiles/gpu --config papers={','.join(slugs)}"


def _files(runs: Iterable[Run]) -> dict[str, Mapping[str, Any]]:
    """What runs read at paper scale, by repository or file, with their catalogue entries."""
    read = {"model": lookup.model, "dataset": lookup.dataset}
    entries = {pair: read[pair[0]](pair[1]).get("paper", {}) for run in runs for pair in run.names}
    return {entry.get("hub") or entry.get("file") or name: entry for (_, name), entry in entries.items()}


def _terms(entry: Mapping[str, Any]) -> str:
    return (entry.get("licence") or "licence not stated") + (", gated" if entry.get("gated") else "")
