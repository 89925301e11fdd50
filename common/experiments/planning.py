"""The runs that follow from what papers report.

Jobs are runs, not cells: a reported cell names a run and a metric of it, many cells share one run, and equal runs of
different papers are one. Imports no torch, so that a workflow can be planned in no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prunelab.common.catalogue import hub, lookup
from prunelab.common.core import files, registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT
from prunelab.common.experiments import papers, provenance
from prunelab.common.experiments.run import Run

# Kinds that need no scale, and their status.
ANYWHERE: Mapping[str, str] = {
    "macs": "analytic",
    "prompt_macs": "analytic",
    "size": "analytic",
    "function": "measured",
}


ARCHITECTURE_ONLY = ("macs", "prompt_macs", "size", "latency", "prefill")  # kinds that need no weights


# Kinds whose methods see a calibration set, and maybe a model's base.
CALIBRATED = ("perplexity", "zero_shot", "classify_weights")


_GPU = ("gpu", "a CUDA GPU (--profile configs/profiles/gpu)")


NEEDS: Mapping[str, tuple[str, str]] = {"latency": _GPU, "prefill": _GPU}


SMOKE_SAMPLES = 32


@dataclass(frozen=True)
class Cell:
    """A papers.reported number and, per scale, the run that reproduces it, or what that run would need."""

    reported: papers.Reported
    metric: str
    status: Literal["analytic", "measured"]
    column: papers.Column | None  # how it is made; None where nothing here can make it
    runs: Mapping[str, Run | str]
    count: Run | None = None  # our own count of a cost that the paper's formula gives


def _settings(scale: str, data: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings at a scale: a stand-in for the paper's data has some of its own, as its texts are of another length."""
    entry = lookup.dataset(data).get("testbed" if scale == "smoke" else scale, {}) if data else {}
    values = {**given, **entry.get("settings", {})}
    if "samples" in entry:
        values.setdefault("samples", entry["samples"])
    if scale == "smoke" and data:
        values["samples"] = min(SMOKE_SAMPLES, values.get("samples") or SMOKE_SAMPLES)
    return values


def entries(
    task: str, method: str | None = None, model: str | None = None, ids: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """The files that a run's sources begin with: its task, its method, and everything that code finds by name.

    That is what builds a model (a testbed's module, a backbone, a method's learned parts), the engine of the method's
    wing, and the adapter that the catalogue names for the model, each where something that looks it up is reached.
    """
    found = [f"common/tasks/{task}.py"]
    if method is not None:
        found += [_method(method), *_engine(_method(method))]
    for identity in (ids or {}).values():
        found += _builders(identity) if isinstance(identity, Mapping) else ()
    entry = lookup.model(model) if model else {}
    reached = {str(path.relative_to(ROOT)) for path in provenance.closure((ROOT / f for f in found), provenance.SILENT)}
    for wing, key in (("tokens", "adapter"), ("weights", "weight_adapter")):
        if key in entry and f"common/{wing}/adapters/__init__.py" in reached:
            found.append(f"common/{wing}/adapters/{entry[key]}.py")
    return tuple(dict.fromkeys(found))


def _engine(method: str) -> Iterator[str]:
    """The engine of the wing whose role a method file fills."""
    for path in provenance.closure([ROOT / method], provenance.SILENT):
        engine = path.with_name("apply.py")
        if path.name == "role.py" and path.parent.parent.name == "common" and engine.exists():
            yield str(engine.relative_to(ROOT))


def _builders(identity: Mapping[str, Any]) -> Iterator[str]:
    """The files that build the model of an identity, where code finds them by name."""
    architecture = identity.get("architecture", identity)
    if "testbed" in identity:
        path = _defining("common/testbeds/*.py", "testbed", identity["testbed"])
        yield from ("common/testbeds/__init__.py", path)
        carried = provenance.constant(ROOT / path, "METHOD")
        if carried is not None:  # a testbed that carries a method's learned parts
            yield _method(carried)
    if architecture.get("library") == "backbones":
        yield f"common/backbones/{architecture['name'].partition(':')[0]}.py"
    if "parts" in identity:
        yield from ("common/tokens/parts.py", _method(identity["parts"]))


def resolve(
    kind: str,
    scale: str,
    config: Mapping[str, Any],
    configuration: papers.Configuration,
    *,
    model: str | None = None,
    data: str | None = None,
    budget: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run | str:
    """The run of a configuration at a scale, or what it needs in words."""
    settings = {**(settings or {}), **configuration.settings}
    budget = budget or configuration.budget if configuration.method else None
    if kind == "function":
        module = str(settings["call"]).split(":")[0].removeprefix("prunelab.").replace(".", "/") + ".py"
        return Run(kind, "", settings=settings, entries=(*entries(kind), module), ids=_data_files(module))
    setting, what = NEEDS.get(kind, ("", ""))
    needs = what if setting and not config[setting] else ""
    named: list[tuple[hub.Kind, str]] = []
    # Names of the paper's models do not enter: two papers' models that share a stand-in share its runs.
    if kind in ARCHITECTURE_ONLY:
        assert model is not None
        ids = {"model": lookup.model(model)["architecture"]}
        scale = "" if kind in ANYWHERE else scale
    else:
        settings = _settings(scale, data, settings)
        used = {"": (model, data)}
        if "draft" in settings:
            used["draft"] = (settings.pop("draft"), None)
        if kind in CALIBRATED:
            calibration = settings.pop("calibration_data", data)
            if configuration.method is None:  # then the unpruned model is one run, whatever methods calibrate on
                settings.pop("calibration", None)
            else:
                used |= {"calibration": (None, calibration), "base": (lookup.model(str(model)).get("base"), None)}
        if kind in ("zero_shot", "visual_tasks"):  # their tasks bring their own data
            used |= {f"data of {name}": (None, name) for name in lookup.of_tasks(settings.get("tasks", ()))}
        for of_model, of_data in used.values() if scale == "paper" else ():
            if of_model:
                named.append(("model", of_model))
            if of_data:
                named.append(("dataset", of_data))
        reasons = [lookup.missing(*names, scale, config) for names in used.values()]
        lacking = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        if lacking and (scale != "paper" or not all(lookup.named(*names, scale) for names in used.values())):
            return lacking
        needs = lacking or needs
        ids = {}
        for name, names in used.items():
            ids |= {name or key: value for key, value in lookup.identity(*names, scale, config).items()}
    gpus = max((lookup.model(name)["paper"].get("gpus", 1) for of, name in named if of == "model"), default=1)
    method, options = configuration.method, configuration.options
    sources = entries(kind, method, model, ids)
    return Run(kind, scale, method, options, budget, settings, ids, sources, needs, tuple(named), gpus)


def _data_files(module: str) -> dict[str, Any]:
    """Hashes of the CSV files beside a paper's own table function."""
    folder = (ROOT / module).parent
    return {
        "files": {p.name: files.digest(p.read_text()) for p in sorted(folder.glob("*.csv")) if p.name != "reported.csv"}
    }


def _method(name: str) -> str:
    """The file that defines a method."""
    return f"methods/{registry.entry(name).slug}/method.py"


@cache
def _defining(pattern: str, what: str, name: str) -> str:
    """The file that defines the class of a name; read from the text, so that torch stays out."""
    for path in sorted(ROOT.glob(pattern)):
        if name in provenance.names(path):
            return str(path.relative_to(ROOT))
    raise PrunelabError(f"no {pattern} defines the {what} '{name}'")


def scales(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The scales that run: the one asked for, and assets where a folder is given."""
    return (config["scale"], *(("assets",) if config["assets"] and config["scale"] in ("testbed", "paper") else ()))


def cells(slug: str, config: Mapping[str, Any]) -> Iterator[Cell]:
    """Every papers.reported number of a paper with its runs at the scales asked for; `paper` always has an entry."""
    paper = papers.load(slug)
    tables = {table.name: table for table in paper.tables}
    for number in papers.reported(slug):
        table = tables.get(number.table)
        if table is None:
            raise PrunelabError(f"methods/{slug}/paper.yaml says nothing of the papers.reported table '{number.table}'")
        row = table.row(number.row)
        column = row.columns.get(number.column) or table.columns.get(number.column) or table.columns.get("*")
        needs = row.needs or (column.needs if column else table.needs)
        chosen = (column.configuration if column else None) or row.configuration
        if needs is None and (column is None or (chosen is None and column.kind != "function")):
            raise PrunelabError(
                f"methods/{slug}/paper.yaml does not say how '{number.table}', row '{number.row}', column"
                f" '{number.column}' is run; add it, or say under `needs` what it takes"
            )
        if needs is not None or column is None:
            yield Cell(number, "", "measured", None, {"paper": needs or ""})
            continue
        place = {"table": number.table, "row": number.row, "column": number.column}
        metric = (column.metric or "{table}/{row}/{column}").format(**place)
        runs: dict[str, Run | str] = {}
        for scale in dict.fromkeys(("paper", *scales(config))):
            asked = "testbed" if scale == "smoke" else scale
            if column.kind in ANYWHERE and scale != "paper":
                continue
            if column.kind in ANYWHERE and config["scale"] == "smoke" and not table.smoke:
                runs[scale] = "more than the smoke scale runs"
            elif asked not in column.scales:
                runs[scale] = f"nothing: this column is not run at {asked} scale"
            elif scale == "smoke" and not table.smoke:
                runs[scale] = "more than the smoke scale runs"
            else:
                runs[scale] = resolve(
                    column.kind,
                    scale,
                    config,
                    paper.configuration(chosen or "dense"),
                    model=column.model or row.model or table.model,
                    data=column.data,
                    budget=row.budget,
                    settings=column.settings,
                )
        status = ANYWHERE.get(column.kind, "measured")
        count = None
        if column.count is not None and chosen is not None and (config["scale"] != "smoke" or table.smoke):
            model, prompt = column.model or row.model or table.model, column.count
            configuration = paper.configuration(chosen).model_copy(update={"settings": {}})
            made = resolve("prompt_macs", "", config, configuration, model=model, budget=row.budget, settings=prompt)
            count = made if isinstance(made, Run) else None
        yield Cell(number, metric, status, column, runs, count)  # type: ignore[arg-type]


@dataclass(frozen=True)
class BoardPoint:
    """One entry of a board under one budget (None: unpruned) at one scale; the first of a board is its baseline."""

    board: papers.Board
    entry: str
    budget: str | None
    scale: str
    run: Run | str


def points(slug: str, config: Mapping[str, Any]) -> Iterator[BoardPoint]:
    """Every point of a paper's boards at the scales asked for."""
    paper = papers.load(slug)
    for board in paper.boards:
        exact = board.kind in ANYWHERE
        for scale in scales(config)[:1] if exact else scales(config):
            asked = "testbed" if scale == "smoke" else scale
            if (asked not in board.scales and not exact) or (scale == "smoke" and not board.smoke):
                continue
            options = {"model": board.model, "data": board.data, "settings": board.settings}
            unpruned = paper.configuration(board.baseline)  # or a method, then under the first budget
            base = resolve(board.kind, scale, config, unpruned, budget=board.budgets[0], **options)  # type: ignore[arg-type]
            yield BoardPoint(board, board.baseline, board.budgets[0] if unpruned.method else None, scale, base)
            for entry, name in board.entries.items():
                chosen = paper.configuration(name)
                budgets: tuple[str | None, ...] = board.budgets[:1] if scale == "smoke" else board.budgets
                for budget in budgets if chosen.method else (None,):  # without a method there is nothing to spend
                    run = resolve(board.kind, scale, config, chosen, budget=budget, **options)  # type: ignore[arg-type]
                    yield BoardPoint(board, entry, budget, scale, run)


@dataclass(frozen=True)
class FigureRun:
    """A figure's run at one scale, or what it needs in words."""

    figure: papers.FigureTask
    scale: str
    run: Run | str


def figures(slug: str, config: Mapping[str, Any]) -> Iterator[FigureRun]:
    """Every figure of a paper that needs a run, at the scales asked for."""
    paper = papers.load(slug)
    for figure in paper.figures:
        for scale in scales(config):
            if ("testbed" if scale == "smoke" else scale) not in figure.scales or (
                scale == "smoke" and not figure.smoke
            ):
                continue
            run = resolve(
                figure.kind,
                scale,
                config,
                paper.configuration(figure.configuration),
                model=figure.model,
                data=figure.data,
                budget=figure.budget,
                settings=figure.settings,
            )
            yield FigureRun(figure, scale, run)


def selected(config: Mapping[str, Any]) -> list[str]:
    """The papers a configuration asks for."""
    asked = config["papers"]
    if asked == "all":
        return papers.slugs()
    names = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else list(asked)
    for name in names:
        papers.load(name)
    return names


def jobs(config: Mapping[str, Any]) -> dict[str, Run]:
    """Every run that the tables need at the scales asked for, by address."""
    wanted = scales(config)
    found: dict[str, Run] = {}
    for slug in selected(config):
        for cell in cells(slug, config):
            for scale, run in cell.runs.items():
                if isinstance(run, Run) and (scale in wanted or run.scale == ""):
                    found[run.address] = run
            if cell.count:
                found[cell.count.address] = cell.count
        for point in points(slug, config):
            if isinstance(point.run, Run):
                found[point.run.address] = point.run
        for figure in figures(slug, config):
            if isinstance(figure.run, Run):
                found[figure.run.address] = figure.run
    results = Path(config["results"])
    # A paper-scale record that only the code has left behind is shown as stale, and made anew on request alone.
    made = {path.stem.partition("-")[0] for path in (results / "records").glob("*.json")}
    old = {a for a, r in found.items() if r.scale == "paper" and not r.path(results).exists() and r.identity in made}
    return {a: r for a, r in found.items() if a not in old and not r.needs}


def batches(runs: Mapping[str, Run], results: Path, size: int) -> list[list[str]]:
    """Addresses of the runs that have no record yet, in batches of one kind that take as many GPUs: a job a batch saves
    start-up time."""
    groups: dict[str, list[str]] = {}
    for address, run in runs.items():
        if not run.path(results).exists():
            groups.setdefault(f"{run.kind} {run.scale} {run.gpus}", []).append(address)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
