"""Papers: what `methods/<slug>/paper.yaml` and `reported.csv` say. Imports no torch."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunelab.common import tasks
from prunelab.common.core import index
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT, read_yaml
from prunelab.common.core.registry import choose
from prunelab.common.experiments import lines
from prunelab.common.tasks.base import nearest

METHODS = ROOT / "methods"
BOARDS = ROOT / "configs" / "boards"
BENCHMARKS = ROOT / "configs" / "benchmarks.yaml"

COLUMNS = ("table", "row", "column", "value", "unit", "source", "quality")  # of reported.csv
QUALITIES = ("primary", "secondary", "by-eye")

FAMILIES = ("convnet", "detr", "diffusion", "llm", "text", "vision_mamba", "vit", "vla", "vlm")  # of what is pruned
# The axes of the pruning survey with its terms.
AXES: Mapping[str, tuple[str, ...]] = {
    "target": ("weights", "experts", "layers", "tokens", "kv_cache", "training_samples", "training_tokens", "sentences",
               "peft_layers"),
    "speedup": ("unstructured", "structured", "semi_structured", "none"),
    "when": ("before_training", "during_training", "after_training", "run_time"),
    "criterion": ("magnitude", "lp_norm", "sensitivity_or_saliency", "loss_change", "none"),
    "learn_to_prune": ("sparsity_regularization", "meta_learning", "graph_neural_network", "reinforcement_learning",
                       "none"),
    "fusion": ("quantization", "tensor_decomposition", "nas", "knowledge_distillation", "none"),
    "data": ("data_free", "data_driven"),
}  # fmt: skip
# As most papers of a role have them; a paper says where it differs.
TAXONOMY: Mapping[str, list[str]] = {
    "target": ["tokens"], "speedup": ["structured"], "when": ["run_time"], "criterion": ["sensitivity_or_saliency"],
    "learn_to_prune": ["none"], "fusion": ["none"], "data": ["data_free"],
}  # fmt: skip
OF_ROLES: Mapping[str, Mapping[str, list[str]]] = {
    "cache_pruner": {"target": ["kv_cache"]},
    "weight_pruner": {"target": ["weights"], "when": ["after_training"], "data": ["data_driven"]},
    "draft_decoder": {"criterion": ["none"]},
    "constrained_sampler": {"criterion": ["none"]},
    "ranker": {"target": ["sentences"]},
}

# Why nothing here can run a number, by the key under which paper.yaml says so.
REASONS: Mapping[str, str] = {
    "judge": "a judge that has to be paid",
    "server": "an evaluation server",
    "licence": "data or weights under a licence, for which there is no public substitute",
    "setting": "a setting, checkpoint or text that no public source gives",
    "hardware": "hardware that is not a common GPU, or the authors' own",
    "robot": "a robot",
}
Needs = Annotated[  # one reason, with what exactly
    dict[Literal["judge", "server", "licence", "setting", "hardware", "robot"], str],
    Field(min_length=1, max_length=1),
]
Assumption = Annotated[str, Field(pattern=r"^(\S.{8,})?$")]  # what decides a run and the source does not say, in words


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Configuration(_Strict):
    """A method with its options and budget; without a method it is the unpruned model. Its settings, such as a
    calibration set of its own, go before those of a column or board; `assumes` says what its runs take for granted that
    the source does not say."""

    method: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    budget: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    assumes: Assumption = ""


class Tolerance(_Strict):
    """A tolerance stated by hand, with why what is computed (`paper_tables.tolerance`) does not fit."""

    value: float = Field(gt=0)
    because: str = Field(min_length=20)


class Place(_Strict):
    """A cell of a table; what is left out is that of the cell which names it."""

    table: str = ""
    row: str = ""
    column: str = ""


class Derivation(_Strict):
    """One of these, of other cells: a column of the same row by its name, `{table, row, column}`, or derived itself; of
    two, `difference` is the first less the second, `ratio` the first by the second, `share` that in percent, and
    `saving` what the second lacks of the first, in percent."""

    mean: tuple[str | Place | Derivation, ...] = ()
    difference: tuple[str | Place | Derivation, ...] = ()
    ratio: tuple[str | Place | Derivation, ...] = ()
    share: tuple[str | Place | Derivation, ...] = ()
    saving: tuple[str | Place | Derivation, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        (how, *more), members = [key for key, given in self if given] or ("", ""), self.members
        if more or (how != "mean" and len(members) != 2) or len(members) < 2:
            raise ValueError("write one of mean, of several, or difference, ratio, share or saving, of two")
        return self

    @property
    def how(self) -> str:
        """Which of them it is."""
        return next((key for key, given in self if given), "")

    @property
    def members(self) -> tuple[str | Place | Derivation, ...]:
        """What it is made of."""
        return next((given for _, given in self if given), ())


class Column(_Strict):
    """How the cells of a column are made: the task, its data set, and the metric to show; `needs` says why nothing
    here can make them: `{reason: what exactly}`; `assumes` under which assumption they are made; `derived` of which
    other cells they are the mean or difference, where no run of theirs makes them."""

    task: str = ""
    derived: Derivation | None = None
    needs: Needs | None = None
    assumes: Assumption = ""
    metric: str = ""
    data: str | None = None
    model: str | None = None  # where columns are models; else that of the row or table
    configuration: str | None = None  # where columns are settings of a method; else that of the row
    settings: dict[str, Any] = Field(default_factory=dict)
    scales: tuple[str, ...] = ()  # paper and testbed, as far as the task has them
    tolerance: Tolerance | None = None  # instead of the computed one
    count: dict[str, Any] | None = None  # the prompt, as settings of `prompt_macs`, of our own count beside a cost


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


class Row(_Strict):
    """What a row of a table runs; `needs` says why nothing here can run it: `{reason: what exactly}`; `assumes` under
    which assumption it runs."""

    configuration: str | None = None
    model: str | None = None
    budget: str | None = None
    needs: Needs | None = None
    assumes: Assumption = ""
    columns: dict[str, Column] = Field(default_factory=dict)


class Table(_Strict):
    """One table of the paper, named as in reported.csv; `budget` is that of its rows, `models` says which model those
    rows run whose names begin so, `assumes` under which assumption all of it runs, `unpruned` which row (`table/row`)
    has the numbers that means are shares of, or which has for rows whose names begin so."""

    name: str
    caption: str = ""
    note: str = ""
    model: str | None = None
    models: dict[str, str] = Field(default_factory=dict)
    budget: str | None = None
    columns: dict[str, Column] = Field(default_factory=dict)
    rows: dict[str, Row | str] = Field(default_factory=dict)
    needs: Needs | None = None
    assumes: Assumption = ""
    unpruned: str | dict[str, str] = ""
    smoke: bool = False

    def row(self, name: str) -> Row:
        """The entry of a reported row; a bare string names a configuration, and an asterisk stands for any text, so
        that `*` alone stands for all others. Of several that fit the longest counts."""
        fitting = (key for key in sorted(self.rows, key=len, reverse=True) if "*" in key and _fits(key, name))
        entry = self.rows.get(name, self.rows.get(next(fitting, "")))
        if entry is None:
            return Row(needs=self.needs) if self.needs else Row()
        row = Row(configuration=entry) if isinstance(entry, str) else entry
        model = next((model for start, model in self.models.items() if name.startswith(start)), None)
        return row.model_copy(update={"model": row.model or model, "budget": row.budget or self.budget})

    def column(self, number: Reported) -> Column | None:
        """How a reported number is made: by its row's own column, else by the table's, `*` for all not named."""
        own = self.row(number.row).columns.get(number.column)
        return own or self.columns.get(number.column) or self.columns.get("*")


class Board(_Strict):
    """A comparison of our own: several configurations under several budgets on one model, shown as table and curve.
    `full` has by scale the settings with which it decides (`--config samples=full`), where a default run has fewer
    samples; the last such run is kept."""

    name: str
    caption: str = ""
    task: str
    data: str | None = None
    model: str | None = None
    metric: str
    label: str = ""  # the metric in words, with its unit
    cost: str = ""  # the metric shown as cost; the saving beside it is named alike
    cost_label: str = ""  # the cost in words
    baseline: str = "dense"
    entries: dict[str, str]
    budgets: tuple[str, ...]
    settings: dict[str, Any] = Field(default_factory=dict)
    full: dict[Literal["testbed", "real", "assets"], dict[str, Any]] = Field(default_factory=dict)
    scales: tuple[str, ...] = ("paper", "assets", "testbed")
    smoke: bool = False


class SharedBoards(_Strict):
    """What a paper brings to boards of `configs/boards/<shared>.yaml`, which share all else; its `settings` go before
    theirs, `title` is put behind their names, `remark` behind their captions, and `boards` says by name where single
    ones differ."""

    shared: str
    only: tuple[str, ...] = ()  # all of them
    title: str = ""
    model: str | None = None  # that of the shared boards
    entries: dict[str, str]
    budgets: tuple[str, ...] = ()  # those of the shared boards
    settings: dict[str, Any] = Field(default_factory=dict)
    remark: str = ""
    boards: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def expanded(self) -> Iterator[dict[str, Any]]:
        """The boards in full."""
        frames = suite(self.shared)
        for name in (*self.only, *self.boards):
            choose(frames, name, f"board in configs/boards/{self.shared}.yaml named")
        for name in self.only or tuple(frames):
            board = {"remark": self.remark, **frames[name], "entries": self.entries}
            board["name"] = f"{name}, {self.title}" if self.title else name
            board["settings"] = {**board.get("settings", {}), **self.settings}
            board |= {key: value for key, value in (("model", self.model), ("budgets", self.budgets)) if value}
            board |= self.boards.get(name, {})
            board["caption"] = f"{board['caption']} {board.pop('remark')}".strip()
            yield board


class FigureTask(_Strict):
    """A picture that needs a run of its own; `methods/<slug>/figures.py` draws it from the record."""

    name: str
    caption: str = ""
    task: str
    configuration: str = "dense"
    model: str | None = None
    data: str | None = None
    budget: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    scales: tuple[str, ...] = ("testbed",)
    smoke: bool = False


class Contrast(_Strict):
    """Two choices with all else equal, which the page shows in one table with the paper's other contrasts: entries of
    its boards, or results of the run of a `figure`, of which more is better and which `metric` names in words."""

    name: str
    choices: tuple[str, str]
    figure: str = ""
    metric: str = ""


class About(_Strict):
    """The head of paper.yaml: bibliography, family and taxonomy."""

    slug: str
    title: str
    authors: list[str]
    venue: str
    year: int  # where the venue does not end with it
    links: dict[str, str] = Field(default_factory=dict)
    family: str
    taxonomy: dict[str, list[str]] = Field(default_factory=dict)
    status: str

    @model_validator(mode="after")
    def _terms_exist(self) -> Self:
        known = {"family": FAMILIES, "taxonomy": tuple(AXES), **{f"taxonomy, {axis}": AXES[axis] for axis in AXES}}
        named = {"family": [self.family], "taxonomy": list(self.taxonomy)}
        named |= {f"taxonomy, {axis}": values for axis, values in self.taxonomy.items() if axis in AXES}
        for where, names in named.items():
            for name in names:
                if name not in known[where]:
                    raise ValueError(f"{where}: there is no '{name}'{nearest(name, known[where])}")
        return self


class Paper(About):
    """paper.yaml."""

    configurations: dict[str, Configuration] = Field(default_factory=dict)
    tables: list[Table] = Field(default_factory=list)
    boards: list[Board] = Field(default_factory=list)
    figures: list[FigureTask] = Field(default_factory=list)
    contrasts: tuple[Contrast, ...] = ()
    claims: tuple[str, ...] = ()  # `A > B`: entry A of a board is better than entry B, wherever both stand

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
        for contrast in self.contrasts:
            figures = [figure.name for figure in self.figures]
            if contrast.figure and contrast.figure not in figures:
                raise ValueError(f"contrast '{contrast.name}' names the unknown figure '{contrast.figure}'")
            if not contrast.figure and not any({*contrast.choices} <= {*board.entries} for board in self.boards):
                raise ValueError(f"no board holds both choices of the contrast '{contrast.name}'")
        for claim in self.claims:
            better, worse = sides(claim)
            if not any({better, worse} <= {board.baseline, *board.entries} for board in self.boards):
                entries = sorted({entry for board in self.boards for entry in board.entries})
                raise ValueError(f"no board holds both sides of the claim '{claim}'; entries: {', '.join(entries)}")
        return self

    def columns(self) -> Iterator[Column]:
        """Every column of every table, those of single rows included."""
        for table in self.tables:
            yield from table.columns.values()
            for row in table.rows.values():
                yield from row.columns.values() if isinstance(row, Row) else ()

    def configuration(self, name: str) -> Configuration:
        """A configuration by name; `dense` always exists."""
        return self.configurations.get(name, Configuration())


def sides(claim: str) -> tuple[str, str]:
    """The entries that a claim `A > B` sets against each other, the better one first."""
    better, sign, worse = claim.partition(" > ")
    if not sign or not better.strip() or not worse.strip():
        raise ValueError(f"'{claim}' is no claim; write it as 'A > B', with names of a board's entries")
    return better.strip(), worse.strip()


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


def completed(board: dict[str, Any]) -> dict[str, Any]:
    """A board with what its task says of metric, cost and scales, where it says nothing of its own."""
    if board.get("task") not in tasks.names():
        return board
    task = tasks.get(board["task"])
    label, cost = task.metrics.get(board.get("metric", "")), board.get("cost", task.cost)
    known = {
        "label": label.label if label else "",
        "cost": cost,
        "cost_label": task.metrics[cost].cost if cost in task.metrics else "",
        "scales": [scale for scale in ("paper", "assets", "testbed") if scale in task.scales or not task.scales],
    }
    return {**known, **board}


@cache
def benchmarks() -> dict[str, dict[str, Any]]:
    """The columns that papers share, of `configs/benchmarks.yaml`."""
    return dict(read_yaml(BENCHMARKS.read_text(encoding="utf-8")))


def filled(slug: str, column: str | dict[str, Any]) -> dict[str, Any]:
    """A column in full: a benchmark's name alone, or a column that has one under `benchmark`, whose own settings go
    before the benchmark's. A function to call is one of a module beside the method."""
    given: dict[str, Any] = {"benchmark": column} if isinstance(column, str) else dict(column)
    settings: dict[str, Any] = dict(given.get("settings", {}))
    if "call" in settings and not str(settings["call"]).startswith("prunelab."):
        given["settings"] = settings = {**settings, "call": f"prunelab.methods.{slug}.{settings['call']}"}
    if "benchmark" not in given:
        return given
    shared = choose(benchmarks(), str(given.pop("benchmark")), "benchmark in configs/benchmarks.yaml named")
    return {**shared, **given, "settings": {**shared.get("settings", {}), **settings}}


def _average(slug: str, table: dict[str, Any]) -> None:
    """Fill in the columns of a table that are means of others; of its rows, where each has its own unpruned model."""
    unpruned, columns = table.get("unpruned", ""), table["columns"]
    if isinstance(unpruned, str):
        table["columns"] = _averaged(columns, _unpruned(slug, unpruned))
        return
    rows: dict[str, dict[str, Any]] = {
        name: {"configuration": row} if isinstance(row, str) else dict(row) for name, row in table["rows"].items()
    }
    for name, row in rows.items():
        start = next((key for key in unpruned if name.startswith(key)), None)
        if start is None:
            raise PrunelabError(f"`unpruned` says no row for '{name}'")
        full = _averaged(columns, _unpruned(slug, unpruned[start]))
        row["columns"] = {key: full[key] for key in columns if "mean" in columns[key]} | row.get("columns", {})
    table["rows"] = rows
    table["columns"] = {key: column for key, column in columns.items() if "mean" not in column}


def _unpruned(slug: str, place: str) -> dict[str, float]:
    """The reported numbers of the row `table/row`, by column; none where no place is given."""
    results = {n.column: n.value for n in reported(slug) if f"{n.table}/{n.row}" == place}
    if place and not results:
        raise PrunelabError(f"`unpruned` says {place}, and reported.csv has no such table and row")
    return results


def _averaged(columns: Mapping[str, dict[str, Any]], against: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Columns with those of `mean` in full: one run of the tasks of all columns that they are the mean of. With numbers
    to compare with, each counts as a share of its own, unless the column's metric is `average`. Where nothing makes a
    member, nothing makes the mean."""
    results = dict(columns)
    for name, column in columns.items():
        if "mean" not in column:
            continue
        rest = {key: value for key, value in column.items() if key != "mean"}
        known = {
            key: other for key, other in columns.items() if other.get("task") == "visual_tasks" or "needs" in other
        }
        members = column["mean"]
        if members == "all":
            members = [key for key in known if not against or key in against]
        members = [choose({key: key for key in known}, key, "column of scores named") for key in members]
        parts = [known[key] for key in members]
        if needs := next((part["needs"] for part in parts if "needs" in part), None):
            results[name] = {"needs": needs}
            continue
        settings: dict[str, Any] = {"tasks": [], "average": [part["metric"] for part in parts]}
        for key, part in zip(members, parts, strict=True):
            for setting, value in part["settings"].items():
                if setting == "tasks":
                    settings["tasks"] += [task for task in value if task not in settings["tasks"]]
                elif settings.setdefault(setting, value) != value:
                    raise PrunelabError(f"'{name}' is a mean of columns that differ in `{setting}`, {key} among them")
        shares = bool(against) and column.get("metric") != "average"
        if shares:
            if lacking := [key for key in members if key not in against]:
                raise PrunelabError(f"'{name}' needs the unpruned model's number for {', '.join(lacking)}")
            settings["against"] = [against[key] for key in members]
        assumed = dict.fromkeys(part["assumes"] for part in (*parts, rest) if part.get("assumes"))
        results[name] = {"task": "visual_tasks", **rest, "settings": settings}
        results[name]["metric"] = "relative" if shares else "average"
        results[name] |= {"assumes": "; ".join(assumed)} if assumed else {}
    return results


@cache
def suite(name: str) -> dict[str, dict[str, Any]]:
    """The boards of `configs/boards/<name>.yaml` by name, without entries."""
    path = choose({path.stem: path for path in BOARDS.glob("*.yaml")}, name, "file in configs/boards/ named")
    return dict(read_yaml(path.read_text(encoding="utf-8")))


@contextmanager
def place(slug: str, **names: str) -> Iterator[None]:
    """Errors inside the block name the paper's file, the line, and what stands there: `table="T1", row="dense"`."""
    try:
        yield
    except PrunelabError as error:
        line = lines.of_names(_text(slug), f"{next(iter(names))}s", tuple(names.values()))
        where = ", ".join(f"{kind} '{name}'" for kind, name in names.items())
        raise PrunelabError(f"{_file(slug, line)}, {where}: {error}") from None


def _file(slug: str, line: int | None) -> str:
    return f"methods/{slug}/paper.yaml{'' if line is None else f', line {line}'}"


def slugs() -> list[str]:
    """Folders below methods/ that hold a paper.yaml."""
    return sorted(path.parent.name for path in METHODS.glob("*/paper.yaml"))


@cache
def about(slug: str) -> About:
    """The head of a paper, for which its tables are not read; errors name file and field."""
    head = re.split(r"(?m)^(?:configurations|tables|boards|figures):", _text(slug), maxsplit=1)[0]
    with _errors(slug):
        return About.model_validate(_completed_head(slug, read_yaml(head)))


@cache
def load(slug: str) -> Paper:
    """A paper, validated; errors name file and field."""
    text = _text(slug)
    with _errors(slug):
        content = _completed_head(slug, read_yaml(text))
        for table in content.get("tables", ()):
            for columns in (table, *(row for row in (table.get("rows") or {}).values() if isinstance(row, dict))):
                if columns.get("columns"):
                    columns["columns"] = {name: filled(slug, column) for name, column in columns["columns"].items()}
            if any("mean" in column for column in (table.get("columns") or {}).values()):
                with place(slug, table=str(table.get("name"))):
                    _average(slug, table)
        content["figures"] = [filled(slug, figure) for figure in content.get("figures") or ()]
        content["boards"] = [
            completed(board)
            for given in content.get("boards", ())
            for board in (SharedBoards.model_validate(given).expanded() if "shared" in given else [given])
        ]
        return Paper.model_validate(content)


def _text(slug: str) -> str:
    path = METHODS / slug / "paper.yaml"
    if not path.exists():
        raise PrunelabError(f"there is no paper '{slug}'; known: {', '.join(slugs())}")
    return path.read_text(encoding="utf-8")


def _completed_head(slug: str, content: dict[str, Any]) -> dict[str, Any]:
    """With the year that the venue ends with, and the taxonomy of the method's role where it says nothing else."""
    role = next((entry.role for entry in index.entries().values() if entry.slug == slug), "")
    content = {"slug": slug, **content}
    if (year := re.search(r"(\d{4})$", str(content.get("venue", "")))) and "year" not in content:
        content["year"] = int(year[1])
    content["taxonomy"] = {**TAXONOMY, **OF_ROLES.get(role, {}), **content.get("taxonomy", {})}
    return content


@contextmanager
def _errors(slug: str) -> Iterator[None]:
    """What pydantic and YAML complain of, as one line that names file and field."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        path = first["loc"] or message.partition(":")[0].split(", ")  # ours say themselves what they are of
        path = path[:1] if "boards" in path[:1] else path  # a shared board is several
        file = _file(slug, lines.of_path(_text(slug), path))
        raise PrunelabError(f"{file}, {f'{where}: ' if where else ''}{message}") from None
    except yaml.YAMLError as error:
        raise PrunelabError(f"methods/{slug}/paper.yaml is not valid YAML: {str(error).splitlines()[0]}") from None


@cache
def reported(slug: str) -> tuple[Reported, ...]:
    """Every number of reported.csv, in file order. Raises PrunelabError with the first line that is none."""
    results: dict[tuple[str, str, str], Reported] = {}
    path = METHODS / slug / "reported.csv"
    if not path.exists():
        raise PrunelabError(f"methods/{slug} has no reported.csv; write the numbers that the paper reports there")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for line in reader:
            try:
                number = _number(line)
                if results.setdefault((number.table, number.row, number.column), number) is not number:
                    raise ValueError("an earlier line has the same table, row and column")
            except ValueError as error:
                raise PrunelabError(f"methods/{slug}/reported.csv, line {reader.line_num}: {error}") from None
    return tuple(results.values())


def _number(line: Mapping[str, str]) -> Reported:
    """One line of reported.csv. Raises ValueError where it says too little, or what nobody understands."""
    if tuple(line) != COLUMNS or None in line.values():
        raise ValueError(f"write {','.join(COLUMNS)}")
    table, row, column, text, unit, source, quality = line.values()
    if quality not in QUALITIES:
        raise ValueError(f"its quality is one of {', '.join(QUALITIES)}, not '{quality}'")
    if not source:
        raise ValueError("a number needs its source")
    try:
        return Reported(table, row, column, float(text), text, unit, source, quality)
    except ValueError:
        raise ValueError(f"'{text}' is no number") from None
