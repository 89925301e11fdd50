"""The tables of CONTRIBUTING.md that follow from the code: `python -m tests.guide` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import BaseModel

from prunelab.common import tasks
from prunelab.common.core import index
from prunelab.common.core.files import ROOT
from prunelab.common.experiments import planning, provenance, schema

PAGE = ROOT / "CONTRIBUTING.md"
ROOMS = sorted(p.parent.name for p in (ROOT / "common").glob("*/__init__.py"))


def _first(text: str | None) -> str:
    return re.split(r"(?<=[a-z`)])\.(?:\s|$)", " ".join((text or "").split()))[0]


def _table(header: str, rows: Iterator[tuple[str, ...]]) -> str:
    columns = header.split("|")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def task_table() -> str:
    """Every task with what it gives, what it runs under, where, and its settings."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name in tasks.names():
            task = tasks.get(name)
            module = __import__(task.__module__, fromlist=["x"])
            under = ", ".join(role.replace("_", " ") for role in task.roles) or "none"
            scales = ", ".join(task.scales) or "none: exact"
            given = ", ".join(f"`{setting}`" for setting in task.known() if setting not in ("seed", "seeds"))
            yield f"`{name}`", _first(module.__doc__), under, scales, given

    return _table("task|gives|methods|scales|settings", rows())


def room_table() -> str:
    """Every room of common/ with the tasks whose records an edit there makes anew."""
    reached = {name: dict(_rooms(name)) for name in tasks.names()}

    def named(name: str, room: str) -> str:
        roles = [role for role, rooms in reached[name].items() if role and room in rooms]
        whole = len(roles) == len(reached[name]) - 1
        return f"`{name}`" + ("" if whole else f" ({', '.join(roles).replace('_', ' ')})")

    def rows() -> Iterator[tuple[str, ...]]:
        for room in ROOMS:
            touched = [named(name, room) for name in tasks.names() if room in set().union(*reached[name].values())]
            if room in ("testbeds", "training", "backbones"):
                yield f"`{room}`", "the runs on models that it builds"
            elif room in ("tasks", "measures"):
                yield f"`{room}`", "the file's own task; all, of `base` and `bench`"
            elif f"common/{room}" in provenance.SILENT or not touched:
                yield f"`{room}`", "none"
            else:
                yield f"`{room}`", "all" if len(touched) >= len(tasks.names()) - 1 else ", ".join(touched)

    return _table("room|an edit makes anew records of", rows())


def _rooms(task: str) -> Iterator[tuple[str, set[str]]]:
    """Rooms that a task reaches under methods of each of its roles, by their engines ('': under no method)."""
    roles = {entry.role: entry.name for entry in index.entries().values()}
    for role, method in {"": None, **roles}.items():
        if role in ("", *tasks.get(task).roles):
            settings = {"call": "prunelab.methods.fastv.tables:costs"} if task == "function" else {}
            files = planning.entries(task, method, settings=settings)
            own = [file for file in files if not file.startswith("methods/")]
            yield role, {file.split("/")[1] for file in provenance.reached(tuple(own))}


def form() -> str:
    """What paper.yaml may say, model by model."""

    def lines() -> Iterator[str]:
        for name, model in (
            ("paper.yaml", schema.Paper), ("a configuration", schema.Configuration), ("a table", schema.Table),
            ("a row", schema.Row), ("a column", schema.Column), ("a derivation", schema.Derivation),
            ("a place", schema.Place), ("a tolerance", schema.Tolerance),
            ("a board", schema.Board), ("shared boards", schema.SharedBoards), ("a figure", schema.FigureTask),
            ("a contrast", schema.Contrast),
        ):  # fmt: skip
            fields = ", ".join(_field(model, key) for key in model.model_fields if key != "slug")
            about = _first(model.__doc__).removesuffix(".")
            yield (
                f"- **{name}**"
                + ("" if about == "paper.yaml" else f" ({about[:1].lower()}{about[1:]})")
                + f": {fields}"
            )

    return "\n".join(lines())


def _field(model: type[BaseModel], name: str) -> str:
    return f"`{name}`" + ("" if model.model_fields[name].is_required() else "?")


BLOCKS = {"tasks": task_table, "rooms": room_table, "schema": form}


def written(text: str) -> str:
    """The page with its tables as the code has them."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
