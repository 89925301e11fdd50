"""Papers: what `methods/<slug>/paper.yaml` and `reported.csv` say, and the runs that follow from them.

Jobs are runs, not cells: a reported cell names a run and a metric of it, many cells share one run, and equal runs of
different papers are one. Imports no torch, so that a workflow can be planned in no time.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common import catalogue, hub, provenance
from common.errors import PrunelabError

ROOT = provenance.ROOT
METHODS = ROOT / "methods"
# Kinds that need no scale, and their status.
ANYWHERE: Mapping[str, str] = {
    "macs": "analytic",
    "prompt_macs": "analytic",
    "size": "analytic",
    "function": "measured",
}
_TOLD = ("entries", "needs", "names", "gpus")  # fields of a run that decide nothing of its outcome
ARCHITECTURE_ONLY = ("macs", "prompt_macs", "size", "latency", "prefill")  # kinds that need no weights
# Kinds whose methods see a calibration set, and maybe a model's base.
CALIBRATED = ("perplexity", "zero_shot", "classify_weights")
_GPU = ("gpu", "a CUDA GPU (--profile configs/profiles/gpu)")
NEEDS: Mapping[str, tuple[str, str]] = {"latency": _GPU, "prefill": _GPU}
SMOKE_SAMPLES = 32


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Configuration(_Strict):
    """A method with its options and budget; without a method it is the unpruned model. Its settings, such as a
    calibration set of its own, go before those of a column or board."""

    method: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    budget: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class Tolerance(_Strict):
    """A tolerance stated by hand, with why what is computed (`paper_tables.tolerance`) does not fit."""

    value: float = Field(gt=0)
    because: str = Field(min_length=20)


class Column(_Strict):
    """How the cells of a column are made: the kind of run, its data set, and the metric to show; `needs` says what it
    takes where nothing here can make them."""

    kind: str = ""
    needs: str | None = None
    metric: str = ""
    data: str | None = None
    model: str | None = None  # where columns are models; else that of the row or table
    configuration: str | None = None  # where columns are settings of a method; else that of the row
    settings: dict[str, Any] = Field(default_factory=dict)
    scales: tuple[str, ...] = ("paper", "testbed")
    tolerance: Tolerance | None = None  # instead of the computed one
    count: dict[str, Any] | None = None  # the prompt, as settings of `prompt_macs`, of our own count beside a cost


class Row(_Strict):
    """What a row of a table runs; `needs` says what it takes where nothing here can run it."""

    configuration: str | None = None
    model: str | None = None
    budget: str | None = None
    needs: str | None = None
    columns: dict[str, Column] = Field(default_factory=dict)


class Table(_Strict):
    """One table of the paper, named as in reported.csv."""

    name: str
    caption: str = ""
    note: str = ""
    model: str | None = None
    columns: dict[str, Column] = Field(default_factory=dict)
    rows: dict[str, Row | str] = Field(default_factory=dict)
    needs: str | None = None
    smoke: bool = False

    def row(self, name: str) -> Row:
        """The entry of a reported row; a bare string names a configuration, `*` stands for all others."""
        entry = self.rows.get(name, self.rows.get("*"))
        if entry is None:
            return Row(needs=self.needs) if self.needs else Row()
        return Row(configuration=entry) if isinstance(entry, str) else entry


class Board(_Strict):
    """A comparison of our own: several configurations under several budgets on one model, shown as table and curve."""

    name: str
    caption: str = ""
    kind: str
    data: str | None = None
    model: str | None = None
    metric: str
    label: str = ""  # the metric in words, with its unit
    cost: str = "gmacs"  # the metric shown as cost; the saving beside it is named alike
    cost_label: str = "MACs"  # the cost in words
    baseline: str = "dense"
    entries: dict[str, str]
    budgets: tuple[str, ...]
    settings: dict[str, Any] = Field(default_factory=dict)
    scales: tuple[str, ...] = ("paper", "assets", "testbed")
    smoke: bool = False


class FigureTask(_Strict):
    """A picture that needs a run of its own; `methods/<slug>/figures.py` draws it from the record."""

    name: str
    caption: str = ""
    kind: str
    configuration: str = "dense"
    model: str | None = None
    data: str | None = None
    budget: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    scales: tuple[str, ...] = ("testbed",)
    smoke: bool = False


class Paper(_Strict):
    """paper.yaml."""

    slug: str
    title: str
    authors: list[str]
    venue: str
    year: int
    links: dict[str, str] = Field(default_factory=dict)
    bibtex: str
    family: str
    taxonomy: dict[str, list[str]]
    status: str
    configurations: dict[str, Configuration] = Field(default_factory=dict)
    tables: list[Table] = Field(default_factory=list)
    boards: list[Board] = Field(default_factory=list)
    figures: list[FigureTask] = Field(default_factory=list)

    @model_validator(mode="after")
    def _configurations_exist(self) -> Paper:
        known = {"dense", *self.configurations}
        for table in self.tables:
            for name in table.rows:
                row = table.row(name)
                for used in (row.configuration, *(column.configuration for column in row.columns.values())):
                    if used is not None and used not in known:
                        raise ValueError(f"table '{table.name}', row '{name}' names the unknown configuration '{used}'")
            for name, column in table.columns.items():
                used = column.configuration
                if used is not None and used not in known:
                    raise ValueError(f"table '{table.name}', column '{name}' names the unknown configuration '{used}'")
        for board in self.boards:
            for used in (*board.entries.values(), board.baseline):
                if used not in known:
                    raise ValueError(f"board '{board.name}' names the unknown configuration '{used}'")
        for figure in self.figures:
            if figure.configuration not in known:
                raise ValueError(f"figure '{figure.name}' names the unknown configuration '{figure.configuration}'")
        return self

    def configuration(self, name: str) -> Configuration:
        """A configuration by name; `dense` always exists."""
        return self.configurations.get(name, Configuration())


@dataclass(frozen=True)
class Reported:
    """A number that a paper printed, with where it stands."""

    table: str
    row: str
    column: str
    value: float
    text: str
    unit: str
    source: str
    quality: str


@dataclass(frozen=True)
class Run:
    """One job: everything that decides its outcome, resolved. `scale` is '' where the outcome has none.

    needs: what is not at hand here, in words. Such a run is no job, but a record made elsewhere is shown.
    names: the catalogue's names of what it reads, as one of the tables that show it has them. gpus: how many its job
    takes where it computes on GPUs.
    """

    kind: str
    scale: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)
    entries: tuple[str, ...] = ()
    needs: str = ""
    names: tuple[tuple[hub.Kind, str], ...] = ()
    gpus: int = 1

    @cached_property
    def identity(self) -> str:
        """Hash of what is run."""
        return provenance.digest({k: v for k, v in asdict(self).items() if k not in _TOLD})[:20]

    @cached_property
    def sources(self) -> str:
        """Hash of the code that runs it."""
        return provenance.sources(ROOT / entry for entry in self.entries)[:12]

    @property
    def stand_in(self) -> bool:
        """Whether it reads a folder of the user's in the place of a repository, of which nobody knows that it is the
        published one."""
        return any(isinstance(ids, Mapping) and "local" in ids for ids in self.ids.values())

    @property
    def address(self) -> str:
        """Name of the record."""
        return f"{self.identity}-{self.sources}"

    def path(self, results: Path) -> Path:
        """Where the record lies."""
        return results / "records" / f"{self.address}.json"


@dataclass(frozen=True)
class Cell:
    """A reported number and, per scale, the run that reproduces it, or what that run would need."""

    reported: Reported
    metric: str
    status: Literal["analytic", "measured"]
    column: Column | None  # how it is made; None where nothing here can make it
    runs: Mapping[str, Run | str]
    count: Run | None = None  # our own count of a cost that the paper's formula gives


def slugs() -> list[str]:
    """Folders below methods/ that hold a paper.yaml."""
    return sorted(path.parent.name for path in METHODS.glob("*/paper.yaml"))


@cache
def load(slug: str) -> Paper:
    """A paper, validated; errors name file and field."""
    path = METHODS / slug / "paper.yaml"
    if not path.exists():
        raise PrunelabError(f"there is no paper '{slug}'; known: {', '.join(slugs())}")
    try:
        return Paper.model_validate({"slug": slug, **yaml.safe_load(path.read_text())})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PrunelabError(f"methods/{slug}/paper.yaml, {where or 'top level'}: {first['msg']}") from None
    except yaml.YAMLError as error:
        raise PrunelabError(f"methods/{slug}/paper.yaml is not valid YAML: {str(error).splitlines()[0]}") from None


@cache
def reported(slug: str) -> tuple[Reported, ...]:
    """Every number of reported.csv, in file order."""
    path = METHODS / slug / "reported.csv"
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return tuple(
                Reported(
                    r["table"],
                    r["row"],
                    r["column"],
                    float(r["value"]),
                    r["value"],
                    r["unit"],
                    r["source"],
                    r["quality"],
                )
                for r in csv.DictReader(file)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PrunelabError(
                f"methods/{slug}/reported.csv: every line needs a number under 'value' ({error})"
            ) from None


def _settings(scale: str, data: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings at a scale: a stand-in for the paper's data has some of its own, as its texts are of another length."""
    entry = catalogue.dataset(data).get("testbed" if scale == "smoke" else scale, {}) if data else {}
    values = {**given, **entry.get("settings", {})}
    if "samples" in entry:
        values.setdefault("samples", entry["samples"])
    if scale == "smoke" and data:
        values["samples"] = min(SMOKE_SAMPLES, values.get("samples") or SMOKE_SAMPLES)
    return values


def _adapter(model: str | None) -> tuple[str, ...]:
    entry = catalogue.model(model) if model else {}
    places = {"adapter": "common/adapters", "weight_adapter": "common/weights/adapters"}
    return tuple(f"{folder}/{entry[key]}.py" for key, folder in places.items() if key in entry)


def resolve(
    kind: str,
    scale: str,
    config: Mapping[str, Any],
    configuration: Configuration,
    *,
    model: str | None = None,
    data: str | None = None,
    budget: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run | str:
    """The run of a configuration at a scale, or what it needs in words."""
    settings = {**(settings or {}), **configuration.settings}
    method_files = (f"methods/{_folder(configuration.method)}/method.py",) if configuration.method else ()
    entries = (f"common/tasks/{kind}.py", *method_files, *_adapter(model))
    budget = budget or configuration.budget if configuration.method else None
    if kind == "function":
        module = str(settings["call"]).split(":")[0].replace(".", "/") + ".py"
        return Run(kind, "", settings=settings, entries=(entries[0], module), ids=_data_files(module))
    setting, what = NEEDS.get(kind, ("", ""))
    needs = what if setting and not config[setting] else ""
    named: list[tuple[hub.Kind, str]] = []
    # Names of the paper's models do not enter: two papers' models that share a stand-in share its runs.
    if kind in ARCHITECTURE_ONLY:
        assert model is not None
        ids = {"model": catalogue.model(model)["architecture"]}
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
                used |= {"calibration": (None, calibration), "base": (catalogue.model(str(model)).get("base"), None)}
        if kind in ("zero_shot", "visual_tasks"):  # their tasks bring their own data
            used |= {f"data of {name}": (None, name) for name in catalogue.of_tasks(settings.get("tasks", ()))}
        for of_model, of_data in used.values() if scale == "paper" else ():
            if of_model:
                named.append(("model", of_model))
            if of_data:
                named.append(("dataset", of_data))
        reasons = [catalogue.missing(*names, scale, config) for names in used.values()]
        lacking = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        if lacking and (scale != "paper" or not all(catalogue.named(*names, scale) for names in used.values())):
            return lacking
        needs = lacking or needs
        ids = {}
        for name, names in used.items():
            ids |= {name or key: value for key, value in catalogue.identity(*names, scale, config).items()}
    gpus = max((catalogue.model(name)["paper"].get("gpus", 1) for of, name in named if of == "model"), default=1)
    method, options = configuration.method, configuration.options
    return Run(kind, scale, method, options, budget, settings, ids, entries, needs, tuple(named), gpus)


def _data_files(module: str) -> dict[str, Any]:
    """Hashes of the CSV files beside a paper's own table function."""
    folder = (ROOT / module).parent
    return {
        "files": {
            p.name: provenance.digest(p.read_text()) for p in sorted(folder.glob("*.csv")) if p.name != "reported.csv"
        }
    }


@cache
def _folder(method: str) -> str:
    """The folder whose method.py registers a name; read from the text, so that torch stays out."""
    for path in sorted(METHODS.glob("*/method.py")):
        if f'name: ClassVar[str] = "{method}"' in path.read_text():
            return path.parent.name
    raise PrunelabError(f"no methods/*/method.py registers the name '{method}'")


def scales(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The scales that run: the one asked for, and assets where a folder is given."""
    return (config["scale"], *(("assets",) if config["assets"] and config["scale"] in ("testbed", "paper") else ()))


def cells(slug: str, config: Mapping[str, Any]) -> Iterator[Cell]:
    """Every reported number of a paper with its runs at the scales asked for; `paper` always has an entry."""
    paper = load(slug)
    tables = {table.name: table for table in paper.tables}
    for number in reported(slug):
        table = tables.get(number.table)
        if table is None:
            raise PrunelabError(f"methods/{slug}/paper.yaml says nothing of the reported table '{number.table}'")
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

    board: Board
    entry: str
    budget: str | None
    scale: str
    run: Run | str


def points(slug: str, config: Mapping[str, Any]) -> Iterator[BoardPoint]:
    """Every point of a paper's boards at the scales asked for."""
    paper = load(slug)
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

    figure: FigureTask
    scale: str
    run: Run | str


def figures(slug: str, config: Mapping[str, Any]) -> Iterator[FigureRun]:
    """Every figure of a paper that needs a run, at the scales asked for."""
    paper = load(slug)
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
        return slugs()
    names = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else list(asked)
    for name in names:
        load(name)
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
