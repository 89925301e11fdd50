"""The runs that follow from what papers report.

Jobs are runs, not cells: a reported cell names a run and a metric of it, many cells share one run, and equal runs of
different papers are one. Imports no torch, so that a workflow can be planned in no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prunelab.common import tasks
from prunelab.common.catalogue import hub, lookup
from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT
from prunelab.common.experiments import papers, provenance, schema
from prunelab.common.experiments.derived import Derived
from prunelab.common.experiments.run import Run
from prunelab.common.tasks.base import Task, nearest

GPU = "a CUDA GPU (--profile configs/profiles/gpu)"
SMOKE_SAMPLES = 32


@dataclass(frozen=True)
class Cell:
    """A reported number and, per scale, the run that reproduces it, or what that run would need. reason: one of
    `schema.REASONS` where nothing here can run it. assumes: what the run takes for granted that the source does not
    say, so that its number neither confirms nor refutes the reported one."""

    reported: schema.Reported
    metric: str
    status: Literal["analytic", "measured"]
    column: schema.Column | None  # how it is made; None where nothing here can make it
    runs: Mapping[str, Run | Derived | str]
    count: Run | None = None  # our own count of a cost that the paper's formula gives
    reason: str = ""
    assumes: str = ""


def entries(
    task: str,
    method: str | None = None,
    model: str | None = None,
    ids: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """The files that a run's sources begin with: its task, its method, and everything that code finds by name.

    That is what builds a model (a testbed's module, a backbone, a method's learned parts), the engine of the method's
    wing, and the adapter that the catalogue names for the model, each where something that looks it up is reached.
    """
    results = [f"common/tasks/{task}.py", *tasks.get(task).files(settings or {})]
    if method is not None:
        by_role = tasks.get(task).by_role.get(registry.entry(method).role)
        results += [_method(method), *_engine(_method(method)), *([by_role] if by_role else [])]
    for identity in (ids or {}).values():
        results += _builders(identity) if isinstance(identity, Mapping) else ()
    entry = lookup.model(model) if model else {}
    reached = provenance.reached(tuple(results))
    for wing, key in (("tokens", "adapter"), ("weights", "weight_adapter")):
        if key in entry and f"common/{wing}/adapters/__init__.py" in reached:
            results.append(f"common/{wing}/adapters/{entry[key]}.py")
    return tuple(dict.fromkeys(results))


def _engine(method: str) -> Iterator[str]:
    """The engine of the wing whose role a method file fills."""
    for path in provenance.reached((method,)):
        engine = path.removesuffix("role.py") + "apply.py"
        if path.endswith("/role.py") and (ROOT / engine).exists():
            yield engine


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
    if "layout" in identity:
        yield f"common/backbones/{identity['layout']}.py"
    if "parts" in identity:
        yield from ("common/tokens/parts.py", _method(identity["parts"]))


def resolve(
    name: str,
    scale: str,
    config: Mapping[str, Any],
    configuration: schema.Configuration,
    *,
    model: str | None = None,
    data: str | None = None,
    budget: str | None = None,
    settings: Mapping[str, Any] | None = None,
    full: Mapping[str, Any] | None = None,
) -> Run | str:
    """The run of a task and configuration at a scale, or what it needs in words. full: settings that go before all
    others. Raises PrunelabError where the task, a name or a setting is unknown."""
    task = tasks.get(name)
    if not task.roles:
        configuration = schema.Configuration()
    method = configuration.method
    settings = {**merged(task, scale, data, settings or {}, configuration), **(full or {})}
    task.read(settings)
    budget = budget or configuration.budget if method else None
    task.admit(method, budget)
    if method is not None:
        registry.fit(registry.entry(method), configuration.options)
    needs = GPU if task.needs_gpu and not config["gpu"] else ""
    ids: dict[str, Any] = {}
    names: list[tuple[hub.Kind, str]] = []
    gpus = 1
    # Names of the paper's models do not enter: two papers' models that share a stand-in share its runs.
    if "architecture" in task.reads:
        ids = {"model": lookup.architecture(str(model))}
    elif task.reads:
        used = _used(task, method, model, data, settings, scale)
        results = {of: lookup.resolve(kind, entry, scale, config) for of, (kind, entry) in used.items()}
        lacking = "; ".join(dict.fromkeys(r.missing for r in results.values() if r.missing))
        if lacking and (scale not in lookup.ELSEWHERE or not all(r.listed for r in results.values())):
            return lacking
        needs = lacking or needs
        ids = {of: r.identity for of, r in results.items()}
        names = list(used.values()) if scale == "paper" else []
        # Weights are pruned where all of them are: a model spread over GPUs is refused.
        undivided = method is not None and registry.entry(method).role == "weight_pruner"
        gpus = 1 if undivided else max(r.gpus for r in results.values())
    return Run(
        name, scale if task.scales else "", method, configuration.options, budget, settings, ids,
        entries(name, method, model, ids, settings), needs, tuple(names), gpus,
    )  # fmt: skip


def merged(
    task: type[Task], scale: str, data: str | None, given: Mapping[str, Any], configuration: schema.Configuration
) -> dict[str, Any]:
    """Settings at a scale: a configuration may have some of its own that go before those of a column or board, and so
    has a stand-in for the paper's data, as its texts are of another length."""
    known = task.known()
    values = {**given, **{key: value for key, value in configuration.settings.items() if key in known}}
    if "data" not in task.reads or data is None:
        return values
    entry = lookup.dataset(data).get("testbed" if scale == "smoke" else scale, {})
    values |= {key: value for key, value in entry.get("settings", {}).items() if key in known}
    if "samples" in entry:
        values.setdefault("samples", entry["samples"])
    if scale == "smoke":
        values["samples"] = min(SMOKE_SAMPLES, values.get("samples") or SMOKE_SAMPLES)
    return values


def _used(
    task: type[Task], method: str | None, model: str | None, data: str | None, settings: dict[str, Any], scale: str
) -> dict[str, tuple[hub.Kind, str]]:
    """The catalogue's names of all that a run reads, by what it is for; what a setting names moves here from there."""
    used: dict[str, tuple[hub.Kind, str]] = {}
    if data is not None:
        used["data"] = ("dataset", data)
    if model is not None:
        used["model"] = ("model", model)
        like = lookup.model(model).get(scale, {})
        if isinstance(like, Mapping) and "processor" in like:
            used["processor"] = ("model", like["processor"])
    used |= {key: (kind, settings.pop(key)) for key, kind in task.named.items() if key in settings}
    if "calibration" in task.reads:
        calibration = settings.pop("calibration_data", data)
        if method is None or registry.entry(method).role != "weight_pruner":  # one run, whatever others calibrate on
            settings.pop("calibration", None)
        else:
            if calibration is not None:
                used["calibration"] = ("dataset", calibration)
            if base := lookup.model(str(model)).get("base"):
                used["base"] = ("model", base)
    if "own data" in task.reads:
        used |= {f"data of {name}": ("dataset", name) for name in lookup.of_tasks(settings["tasks"])}
    return used


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
    """The scales that run: the one asked for, beside the testbeds what a package brings, and assets where a folder is
    given."""
    real = ("real",) if config["scale"] == "testbed" else ()
    return (
        config["scale"],
        *real,
        *(("assets",) if config["assets"] and config["scale"] in ("testbed", "paper") else ()),
    )


def cells(slug: str, config: Mapping[str, Any]) -> Iterator[Cell]:
    """Every reported number of a paper with its runs at the scales asked for; `paper` always has an entry."""
    tables = {table.name: table for table in papers.load(slug).tables}
    for number in papers.reported(slug):
        with papers.place(slug, table=number.table, row=number.row, column=number.column):
            if number.table not in tables:
                raise PrunelabError(
                    "it is reported, and there is no such table; add it" + nearest(number.table, tables)
                )
            cell = _cell(slug, tables[number.table], number, config)
        yield cell


def _cell(
    slug: str,
    table: schema.Table,
    number: schema.Reported,
    config: Mapping[str, Any],
    within: tuple[schema.Reported, ...] = (),
) -> Cell:
    """within: the derived numbers of which this is a member."""
    paper, row = papers.load(slug), table.row(number.row)
    column = table.column(number)
    needs = row.needs or (column.needs if column else table.needs)
    if needs is not None:
        ((reason, text),) = needs.items()
        return Cell(number, "", "measured", None, {"paper": text}, reason=reason)
    if column is not None and column.derived is not None:
        return _derived(slug, table, number, column, config, within)
    if column is None:
        raise PrunelabError("nothing says how it is run; add it, or say under `needs` what it takes")
    task, chosen = tasks.get(column.task), column.configuration or row.configuration
    if chosen is None and task.roles:
        raise PrunelabError("nothing says which configuration is run; name one, or say under `needs` what it takes")
    metric = (column.metric or "{table}/{row}/{column}").format(**vars(number))
    task.metric(metric)
    configuration, model = paper.configuration(chosen or "dense"), column.model or row.model or table.model
    runs: dict[str, Run | Derived | str] = {}
    at = column.scales or tuple(scale for scale in ("paper", "testbed") if scale in task.scales)
    for scale in dict.fromkeys(("paper", *scales(config))):
        wanted = "testbed" if scale == "smoke" else scale
        if not task.scales and scale != "paper":
            continue
        if task.scales and wanted not in at:
            if wanted == "real":
                continue
            runs[scale] = f"nothing: this column is not run at {wanted} scale"
        elif config["scale"] == "smoke" and (scale == "smoke" or not task.scales) and not table.smoke:
            runs[scale] = "more than the smoke scale runs"
        else:
            runs[scale] = resolve(
                column.task, scale, config, configuration,
                model=model, data=column.data, budget=row.budget, settings=column.settings,
            )  # fmt: skip
    count = None
    if column.count is not None and chosen is not None and (config["scale"] != "smoke" or table.smoke):
        count = resolve("prompt_macs", "", config, configuration, model=model, budget=row.budget, settings=column.count)
    own = paper.configuration(chosen).assumes if chosen else ""
    assumes = "; ".join(
        dict.fromkeys(assumption for assumption in (table.assumes, row.assumes, own, column.assumes) if assumption)
    )
    return Cell(number, metric, task.status, column, runs, count if isinstance(count, Run) else None, assumes=assumes)


def _derived(
    slug: str,
    table: schema.Table,
    number: schema.Reported,
    column: schema.Column,
    config: Mapping[str, Any],
    within: tuple[schema.Reported, ...],
) -> Cell:
    """A number made of other cells, at the scales that all of them have; what one of them lacks, it lacks."""
    tables = {table.name: table for table in papers.load(slug).tables}
    if number in within:
        raise PrunelabError(f"'{number.table}', '{number.row}', '{number.column}' is derived of itself")
    members: dict[schema.Reported, Cell] = {}

    def member(place: str | schema.Place) -> schema.Reported:
        place = schema.Place(column=place) if isinstance(place, str) else place
        other = replace(number, **{key: name for key, name in place if name})
        if other not in members:
            of = registry.choose(tables, other.table, "table")
            beside = [
                n for n in papers.reported(slug) if n.table == other.table
            ]  # what `*` stands for is written there
            registry.choose({**of.rows, **{n.row: n for n in beside}}, other.row, "row")
            columns = {**of.columns, **of.row(other.row).columns, **{n.column: n for n in beside}}
            registry.choose(columns, other.column, "column")
            try:
                members[other] = _cell(slug, of, other, config, (*within, number))
            except PrunelabError as error:
                raise PrunelabError(f"its '{other.table}', '{other.row}', '{other.column}': {error}") from None
        return other

    def at(scale: str, of: schema.Derivation) -> Derived | str | None:
        parts: list[Derived | tuple[Run, str]] = []
        lacking: list[str | None] = []
        for each in of.members:
            made: Run | Derived | str | None
            if isinstance(each, schema.Derivation):
                made, metric = at(scale, each), ""
            else:
                cell = members[member(each)]
                made, metric = cell.runs.get("paper" if cell.status == "analytic" else scale), cell.metric
            if made is None or isinstance(made, str):
                lacking.append(made)
            else:
                parts.append((made, metric) if isinstance(made, Run) else made)
        return lacking[0] if lacking else Derived(of.how, tuple(parts))

    assert column.derived is not None
    runs = {scale: made for scale in ("paper", *scales(config)) if (made := at(scale, column.derived)) is not None}
    cells = members.values()
    if lacking := next((cell for cell in cells if cell.reason), None):
        return Cell(number, "", "measured", None, {"paper": lacking.runs["paper"]}, reason=lacking.reason)
    exact = all(cell.status == "analytic" for cell in cells)
    assumed = (table.assumes, table.row(number.row).assumes, column.assumes, *(cell.assumes for cell in cells))
    assumes = "; ".join(dict.fromkeys(part for text in assumed for part in text.split("; ") if part))
    return Cell(number, column.derived.how, "analytic" if exact else "measured", column, runs, assumes=assumes)


@dataclass(frozen=True)
class BoardPoint:
    """One entry of a board under one budget (None: unpruned) at one scale; the first of a board is its baseline.
    full: the run with the samples that decide, of which a record may be kept, where `run` has fewer."""

    board: schema.Board
    entry: str
    budget: str | None
    scale: str
    run: Run | str
    full: Run | None = None


def points(slug: str, config: Mapping[str, Any]) -> Iterator[BoardPoint]:
    """Every point of a paper's boards at the scales asked for."""
    for board in papers.load(slug).boards:
        with papers.place(slug, board=board.name):
            results = list(_points(slug, board, config))
        yield from results


def _points(slug: str, board: schema.Board, config: Mapping[str, Any]) -> Iterator[BoardPoint]:
    paper, task = papers.load(slug), tasks.get(board.task)
    task.metric(board.metric)
    if "cost" in board.model_fields_set and board.cost not in ("", "none"):
        task.metric(board.cost)

    def point(scale: str, entry: str, name: str, budget: str | None, spent: str) -> BoardPoint:
        def run(full: Mapping[str, Any] | None) -> Run | str:
            return resolve(
                board.task, scale, config, paper.configuration(name),
                model=board.model, data=board.data, budget=spent, settings=board.settings, full=full,
            )  # fmt: skip

        full = board.full.get(scale) if task.scales else None  # type: ignore[call-overload]
        if full is None:
            return BoardPoint(board, entry, budget, scale, run(None))
        decides = run(full)
        if config["samples"] == "full":
            return BoardPoint(board, entry, budget, scale, decides)
        return BoardPoint(board, entry, budget, scale, run(None), decides if isinstance(decides, Run) else None)

    for scale in scales(config) if task.scales else scales(config)[:1]:
        wanted = "testbed" if scale == "smoke" else scale
        if (wanted not in board.scales and task.scales) or (scale == "smoke" and not board.smoke):
            continue
        first = board.budgets[0]  # the baseline may be a method, then under the first budget
        pruned = paper.configuration(board.baseline).method is not None
        yield point(scale, board.baseline, board.baseline, first if pruned else None, first)
        for entry, name in board.entries.items():
            budgets: tuple[str | None, ...] = board.budgets[:1] if scale == "smoke" else board.budgets
            if paper.configuration(name).method is None:  # without a method there is nothing to spend
                budgets = (None,)
            for budget in budgets:
                yield point(scale, entry, name, budget, budget or first)


@dataclass(frozen=True)
class FigureRun:
    """A figure's run at one scale, or what it needs in words."""

    figure: schema.FigureTask
    scale: str
    run: Run | str


def figures(slug: str, config: Mapping[str, Any]) -> Iterator[FigureRun]:
    """Every figure of a paper that needs a run, at the scales asked for."""
    paper = papers.load(slug)
    for figure in paper.figures:
        for scale in scales(config):
            if ("testbed" if scale == "smoke" else scale) in figure.scales and (scale != "smoke" or figure.smoke):
                with papers.place(slug, figure=figure.name):
                    run = resolve(
                        figure.task, scale, config, paper.configuration(figure.configuration),
                        model=figure.model, data=figure.data, budget=figure.budget, settings=figure.settings,
                    )  # fmt: skip
                yield FigureRun(figure, scale, run)


def check(slug: str) -> None:
    """Raises PrunelabError where a paper.yaml names a task, metric, setting, model, data set, method, option or budget
    that does not exist, at whatever scale it would run."""
    given = lookup.settings({"assets": "", "scale": "testbed"})
    for config in (given, {**given, "assets": str(ROOT)}, {**given, "scale": "paper"}):
        for runs in (cells(slug, config), points(slug, config), figures(slug, config)):
            for _ in runs:
                pass
    paper = papers.load(slug)
    used = {*(c.task for c in paper.columns()), *(b.task for b in paper.boards), *(f.task for f in paper.figures)}
    known = {key for task in used - {""} for key in tasks.get(task).known()}
    for name, configuration in paper.configurations.items():
        for key in configuration.settings.keys() - known:
            with papers.place(slug, configuration=name):
                raise PrunelabError(f"no task of this paper has a setting '{key}'{nearest(key, known)}")


def selected(config: Mapping[str, Any]) -> list[str]:
    """The papers a configuration asks for."""
    wanted = config["papers"]
    if wanted == "all":
        return papers.slugs()
    names = [part.strip() for part in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    for name in names:
        papers.load(name)
    return names


def batches(runs: Mapping[str, Run], results: Path, size: int) -> list[list[str]]:
    """Addresses of the runs that have no record yet, in batches of one task that take as many GPUs: a job a batch saves
    start-up time."""
    groups: dict[str, list[str]] = {}
    for address, run in runs.items():
        if not run.path(results).exists():
            groups.setdefault(f"{run.task} {run.scale} {run.gpus}", []).append(address)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
