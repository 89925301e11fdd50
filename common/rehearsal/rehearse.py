"""`python -m prunelab rehearse`: run every distinct combination of task, model, method and data of the paper scale,
offline and on the CPU, on look-alikes of what it would download.

It goes through the very code that a GPU runs, and shows that the combination works, not what comes out: repositories
are narrow models with random weights and data sets of a few rows, settings are cut to a few samples. A rehearsal leaves
no record; results/rehearsals.json says which passed.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import track

from prunelab.common import tasks
from prunelab.common.catalogue import hub, lookup
from prunelab.common.core import files, registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import plans, runner, workspace
from prunelab.common.experiments.run import Run
from prunelab.common.rehearsal import checkpoints, datasets

# What is left of a run's settings, where its task has them and the run asks for more.
CUT = {
    "samples": 2, "limit": 2, "calibration": 2, "many": 3, "length": 64, "calibration_length": 64, "text_length": 64,
    "new": 4, "draws": 1, "runs": 2, "limited": 8, "epochs": 1, "frames": 4, "warmup": 1, "batch": 4,
    "tuned": 4, "queue": 64, "templates": 1,
}  # fmt: skip
# What runs of one method on one class of models that an evaluation library makes may differ in, and be one rehearsal.
JOINED = ("tasks", "average", "against", "shots_of")
_KINDS: tuple[hub.Kind, ...] = ("model", "dataset")


@dataclass(frozen=True)
class Combination:
    """One of the distinct ones, with a run of it and how many runs are like it."""

    name: str
    run: Run
    runs: int


@dataclass(frozen=True)
class Outcome:
    """How a rehearsal went. address: of the run that was cut short; while it stays, what passed needs no repeating.
    fault: '' where it passed, else in one line. skipped: whether it could not be had here."""

    name: str
    address: str
    runs: int
    fault: str
    skipped: bool
    seconds: float


def combinations(runs: Iterable[Run]) -> list[Combination]:
    """The distinct ones of runs at paper scale, by task, method, options' names, class of model and data. First come
    those with a method on a class of model, or with data, that none before them has."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.scale == "paper" and run.names:
            read = {kind: " ".join(_kind(of, name) for of, name in run.names if of == kind) for kind in _KINDS}
            data = ",".join(run.settings.get("tasks", ())) or read["dataset"]
            method = " ".join([run.method or "unpruned", *sorted(run.options)])
            groups.setdefault((run.task, method, read["model"], data), []).append(run)
    seen: set[tuple[str, ...]] = set()
    early: list[Combination] = []
    late: list[Combination] = []
    for key, alike in groups.items():
        task, method, model, data = key
        parts = {(task, method, model), (task, data)}
        each = Combination(" | ".join(filter(None, key)), min(alike, key=_spent), len(alike))
        (late if parts <= seen else early).append(each)
        seen |= parts
    return early + late


def _kind(kind: hub.Kind, name: str) -> str:
    """A data set by its name, and a model by its class."""
    built = lookup.model(name).get("architecture", {}) if kind == "model" else {}
    return str(built.get("name", name)) if built.get("library") != "timm" else "timm"


def _spent(run: Run) -> tuple[int, float, str]:
    """The model of fewest layers first, then the hardest budget."""
    result = re.search(r"\d+(\.\d+)?", run.budget or "")
    layers = sum(_layers(name) for kind, name in run.names if kind == "model")
    return layers, float(result[0] if result else 1), run.identity


def _layers(name: str) -> int:
    """Of the decoder of a model of transformers; 0 where another library's counts are not known."""
    arguments = lookup.model(name).get("architecture", {}).get("arguments", {})
    return int(arguments.get("text_config", arguments).get("num_hidden_layers", 0))


def groups(combinations: Iterable[Combination]) -> list[list[Combination]]:
    """Those that one run rehearses together, since they differ in what an evaluation library is asked."""
    results: dict[str, list[Combination]] = {}
    for each in combinations:
        settings = dict(cut(each.run).settings)
        rest = {key: value for key, value in settings.items() if key not in JOINED}
        models = [_kind(kind, name) for kind, name in each.run.names if kind == "model"]
        alike = [each.run.task, each.run.method, sorted(each.run.options), models, rest]
        joins = "tasks" in settings and not settings.get("oracle")  # an oracle chooses by one metric
        results.setdefault(files.digest(alike if joins else each.name), []).append(each)
    return list(results.values())


def joined(group: list[Combination]) -> Combination:
    """One that asks all that these do."""
    first, runs = group[0].run, [each.run for each in group]
    if len(group) == 1:
        return group[0]
    settings = dict(first.settings)
    for key in ("tasks", "average"):
        values = dict.fromkeys(value for run in runs for value in run.settings.get(key, ()))
        settings |= {key: list(values)} if values else {}
    settings |= {"shots_of": merged} if (merged := _merged(run.settings.get("shots_of") for run in runs)) else {}
    if against := next((run.settings["against"] for run in runs if run.settings.get("against")), None):
        settings["against"] = [1.0] * len(settings["average"]) if isinstance(against, list | tuple) else against
    data = dict.fromkeys(name for run in runs for name in run.names if name[0] == "dataset")
    names = tuple(name for name in first.names if name[0] != "dataset") + tuple(data)
    ids = {**_merged(run.ids for run in runs), **first.ids}
    return replace(group[0], run=replace(first, settings=settings, names=names, ids=ids))


def _merged(given: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    return {key: value for each in given for key, value in (each or {}).items()}


def cut(run: Run) -> Run:
    """A run on a few samples."""
    task = tasks.get(run.task)
    known, given = task.known(), dict(run.settings)
    least = {key: value for key, value in CUT.items() if key in known}
    for key, value in least.items():
        before = given.get(key, task.Settings.model_fields[key].default if key in task.Settings.model_fields else None)
        if before is None or (isinstance(before, int) and not isinstance(before, bool) and before > value):
            given[key] = value
    return replace(run, settings=given)


class LookAlikes:
    """A folder of them, each made when it is first asked for. Raises PrunelabError where there is none of a kind."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = {
            **config,
            "scale": "paper",
            "assets": "",
            "hub": str(folder / "hub"),
            "checkpoints": str(folder / "files"),
        }
        self.config |= {"gpu": "1", "programs": "yes"}
        for name in ("hub", "files"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._log: IO[str] | None = None

    def log(self) -> IO[str]:
        """What runs print, and where they failed. It stays open: loggers of libraries keep what they found first."""
        if self._log is None:
            self._log = (self.folder / "rehearsals.log").open("a", encoding="utf-8", buffering=1)
        return self._log

    def prepare(self, run: Run) -> Run:
        """A run that reads look-alikes, all of which are there."""
        used = dict(zip(run.ids, run.names, strict=False))  # in one order
        for kind, name in run.names:
            if (kind, name) != used.get("heads"):
                self.make(kind, name)
        if "heads" in used:
            self._parts(used["heads"][1], run)
        return replace(run, ids={of: checkpoints.small(_identity(v, self.config)) for of, v in run.ids.items()})

    def make(self, kind: hub.Kind, name: str) -> None:
        """That of an entry of the catalogue."""
        entry = (lookup.model if kind == "model" else lookup.dataset)(name)
        (self._model if kind == "model" else self._data)(name, entry)

    def _parts(self, name: str, run: Run) -> None:
        """The learned parts of the run's method, as large as the look-alike of the model needs them."""
        paper = lookup.model(name)["paper"]
        place = Path(self.config["hub"]) / paper["hub"] / paper["file"]
        done = self._whole(place)
        if done is not None:
            assert run.method is not None, "no run without a method has learned parts"
            method = registry.get(run.method)(**run.options)
            checkpoints.learned_parts(method, Path(self.config["hub"]) / run.ids["model"]["hub"], place)
            done.touch()

    def _whole(self, place: Path, described: Any = None) -> Path | None:
        """A place to write to; None where what is wanted, as it is described, is there."""
        done = self.folder / "made" / files.digest(str(place) if described is None else [str(place), described])[:16]
        if done.exists():
            return None
        done.parent.mkdir(exist_ok=True)
        return done

    def _model(self, name: str, entry: Mapping[str, Any]) -> None:
        paper = entry["paper"]
        if paper.get("one_view"):  # another entry tells of the repository as it is
            alike = [e for e in lookup.models().values() if e.get("paper", {}).get("hub") == paper["hub"]]
            entry = next(e for e in alike if not e["paper"].get("one_view"))
        place = Path(self.config["hub"]) / paper["hub"] if "hub" in paper else Path(self.config["checkpoints"])
        place /= paper.get("within", "")
        done = self._whole(place / paper.get("file", ""))
        if done is None:
            return
        if name in checkpoints.WITHOUT_ARCHITECTURE:
            checkpoints.WITHOUT_ARCHITECTURE[name](place / paper.get("file", ""))
            done.touch()
            return
        if "architecture" not in entry:
            raise PrunelabError(f"no look-alike of {name}, whose architecture configs/models.yaml does not tell")
        architecture = entry["architecture"]
        if "layout" in paper and "vision_config" in lookup.model(paper["processor"])["architecture"]["arguments"]:
            self.make("model", paper["processor"])
            like = Path(self.config["hub"]) / lookup.model(paper["processor"])["paper"]["hub"]
            checkpoints.of_layout(paper["layout"], like, place)
        elif "file" in paper:
            identity = {"architecture": architecture, **({"parts": paper["parts"]} if "parts" in paper else {})}
            checkpoints.official(checkpoints.small(identity), place / paper["file"])
        elif architecture["library"] == "timm":
            checkpoints.timm_model(architecture["name"], architecture, place)
        elif architecture["library"] == "transformers":
            seen = "vision_config" in architecture.get("arguments", {})
            checkpoints.transformers_model(architecture, place, seen=seen)
        else:
            checkpoints.own_model(architecture, place)
        done.touch()

    def _data(self, name: str, entry: Mapping[str, Any]) -> None:
        paper = entry["paper"]
        if "setting" in paper:
            self._own(name, paper)
            return
        place = Path(self.config["hub"]) / paper["hub"]
        described = datasets.described().get(paper["hub"])
        named = paper.get("file", paper.get("files", "")) if described is None else ""
        done = self._whole(place / named, described)
        if done is None:
            return
        if described is not None and place.exists():  # of an earlier description, as `datasets` remembers it
            for stale in (place, self.folder / "cache"):
                shutil.rmtree(stale, ignore_errors=True)
        path = place / paper.get("file", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        loader = paper["loader"]
        if described is not None:
            datasets.parts(paper["hub"], place)
        elif loader in datasets.ENTRIES:
            datasets.ENTRIES[loader](place, paper)
        elif loader in datasets.FILES:
            datasets.FILES[loader](path)
        else:
            raise PrunelabError(f"no look-alike of the data set {name} ({paper['hub']})")
        done.touch()

    def _own(self, name: str, paper: Mapping[str, Any]) -> None:
        """In a folder that readers bring."""
        if paper["loader"] not in {*datasets.FOLDERS, *datasets.ENTRIES}:
            raise PrunelabError(f"no look-alike of the data set {name} (--config {paper['setting']}=DIR)")
        place = self.folder / "own" / paper["setting"]
        self.config[paper["setting"]] = str(place)
        done = self._whole(place / name)
        if done is not None:
            path = place / paper.get("file", "")
            path.parent.mkdir(parents=True, exist_ok=True)
            if paper["loader"] in datasets.ENTRIES:
                datasets.ENTRIES[paper["loader"]](path, paper)
            else:
                datasets.FOLDERS[paper["loader"]](path)
            done.touch()


def run(
    config: Mapping[str, Any], folder: Path, *, sample: int | None = None, console: Console | None = None
) -> list[Outcome]:
    """Rehearse the chosen papers' combinations, all or the first `sample`, and note how they went. What is noted to
    have passed with the same sources is not run again, and what is noted of other combinations stays."""
    wanted = combinations(plans.of({**config, "scale": "paper", "assets": ""}).runs.values())[:sample]
    path = Path(config["results"]) / workspace.REHEARSALS
    noted = {o.name: o for o in _noted(path)}
    addresses = {each.name: each.run.address for each in wanted}
    outcomes = {name: o for name, o in noted.items() if not o.fault and o.address == addresses.get(name)}
    if sample is None and config["papers"] == "all":
        noted.clear()  # whatever is not among all of them is no combination any more
    pending = groups(each for each in wanted if each.name not in outcomes)
    with _offline(folder):
        made = LookAlikes(folder, config)
        for group in track(pending, "rehearsing", console=console, transient=True, disable=console is None):
            outcomes |= {o.name: o for o in together(group, made)}
            noted |= outcomes
            files.write_text(path, json.dumps([vars(o) for o in noted.values()], indent=1) + "\n")
    return [outcomes[name] for name in addresses]


@contextmanager
def _offline(folder: Path) -> Iterator[None]:
    """No library asks a server while this is open, and what they keep they keep in the folder."""
    ours = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ours |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "home")}
    before = {key: os.environ.get(key) for key in ours}
    os.environ |= ours
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            os.environ |= {key: value} if value is not None else {}


def _noted(path: Path) -> list[Outcome]:
    """What an earlier rehearsal noted; nothing where the file is absent, or of another form."""
    try:
        return [Outcome(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def together(group: list[Combination], made: LookAlikes) -> list[Outcome]:
    """Outcomes of a group: in one run those of which there are look-alikes, and where that fails each by itself."""
    known = set(sys.modules)
    held = [each for each in group if _held(each, made)]
    whole = rehearse(joined(held), made) if len(held) > 1 else None
    if whole is None or whole.fault:
        outcomes = [rehearse(each, made) for each in group]
    else:
        share = round(whole.seconds / len(held), 1)
        passed = [Outcome(each.name, each.run.address, each.runs, "", False, share) for each in held]
        outcomes = passed + [rehearse(each, made) for each in group if each not in held]
    if set(sys.modules) != known:  # libraries that came stay, and need no looking through by each collection
        gc.collect()
        gc.freeze()
    return outcomes


def _held(combination: Combination, made: LookAlikes) -> bool:
    try:
        made.prepare(cut(combination.run))
    except Exception:  # which the rehearsal of this one alone then names
        return False
    return True


def rehearse(combination: Combination, made: LookAlikes) -> Outcome:
    """One of them."""
    began = time.monotonic()

    def outcome(fault: str, skipped: bool = False) -> Outcome:
        return Outcome(
            combination.name,
            combination.run.address,
            combination.runs,
            fault,
            skipped,
            round(time.monotonic() - began, 1),
        )

    short = cut(combination.run)
    if tasks.get(short.task).needs_gpu:
        return outcome("a CUDA GPU", skipped=True)
    try:
        short = made.prepare(short)
    except PrunelabError as error:
        return outcome(str(error), skipped=True)
    except Exception as error:
        return outcome(f"its look-alike: {_line(error)}")
    log = made.log()
    try:
        with redirect_stdout(log), redirect_stderr(log):
            print(f"-- {combination.name}")
            try:
                runner.measure(short, made.config)
            except (Exception, SystemExit):  # some tasks exit
                traceback.print_exc()
                raise
    except (Exception, SystemExit) as error:
        return outcome(_line(error))
    return outcome("")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _identity(value: Any, config: Mapping[str, Any]) -> Any:
    """What names the look-alike in the place of what an identity names."""
    if not isinstance(value, Mapping) or "hub" not in value:
        return value
    kind: hub.Kind = "dataset" if "loader" in value else "model"
    return {**{k: v for k, v in value.items() if k not in ("revision", "local")}, **hub.identity(value, kind, config)}


def summary(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """How rehearsals went, in lines: how many passed, then each fault with how many it ended, and how many runs of the
    papers they stand for."""
    every = list(outcomes)
    passed = [o for o in every if not o.fault]
    skipped = [o for o in every if o.skipped]
    failed = [o for o in every if o.fault and not o.skipped]
    yield f"{len(passed)} of {len(every)} rehearsals passed, {len(failed)} failed, {len(skipped)} were not held"
    for what, group in (("failed", failed), ("not held", skipped)):
        reasons: dict[str, list[Outcome]] = {}
        for each in group:
            reasons.setdefault(each.fault, []).append(each)
        for reason, alike in sorted(reasons.items(), key=lambda pair: -sum(o.runs for o in pair[1])):
            example = alike[0].name + (", …" if len(alike) > 1 else "")
            yield f"{what}, {len(alike)} (of {sum(o.runs for o in alike)} runs): {reason} ({example})"
