"""Papers: what `methods/<slug>/paper.yaml` and `reported.csv` say. Imports no torch."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import yaml
from pydantic import ValidationError

from prunelab.common import tasks
from prunelab.common.core import index
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT, read_yaml
from prunelab.common.core.registry import choose
from prunelab.common.experiments import lines
from prunelab.common.experiments.schema import OF_ROLES, TAXONOMY, About, Paper, Reported, SharedBoards

METHODS = ROOT / "methods"
BOARDS = ROOT / "configs" / "boards"
BENCHMARKS = ROOT / "configs" / "benchmarks.yaml"

COLUMNS = ("table", "row", "column", "value", "unit", "source", "quality")  # of reported.csv
QUALITIES = ("primary", "secondary", "by-eye")


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


def _expanded(shared: SharedBoards) -> Iterator[dict[str, Any]]:
    """The boards in full."""
    frames = suite(shared.shared)
    for name in (*shared.only, *shared.boards):
        choose(frames, name, f"board in configs/boards/{shared.shared}.yaml named")
    for name in shared.only or tuple(frames):
        board = {"remark": shared.remark, **frames[name], "entries": shared.entries}
        board["name"] = f"{name}, {shared.title}" if shared.title else name
        board["settings"] = {**board.get("settings", {}), **shared.settings}
        board |= {key: value for key, value in (("model", shared.model), ("budgets", shared.budgets)) if value}
        board |= shared.boards.get(name, {})
        board["caption"] = f"{board['caption']} {board.pop('remark')}".strip()
        yield board


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
            for board in (_expanded(SharedBoards.model_validate(given)) if "shared" in given else [given])
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
