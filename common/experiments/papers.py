"""Papers: what `methods/<slug>/paper.yaml` and `reported.csv` say. Imports no torch."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT, read_yaml

METHODS = ROOT / "methods"


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
        return Paper.model_validate({"slug": slug, **read_yaml(path.read_text())})
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
