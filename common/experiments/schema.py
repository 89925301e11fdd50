"""The form of `methods/<slug>/paper.yaml`, and a number of its reported.csv. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prunelab.common.tasks.base import nearest

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
