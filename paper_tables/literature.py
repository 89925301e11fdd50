"""The literature, joined: what papers report of one method on one model, at one budget, by one metric, side by side.

Two papers report the same where their numbers resolve to the same run: then model, data, method, options and budget
are the same, however each of them names its row. Only numbers of runs at paper scale enter. Nothing is run for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from prunelab.common import tasks
from prunelab.common.catalogue import lookup, sizes
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.experiments.plans import Plan
from prunelab.common.experiments.run import Run
from prunelab.paper_tables import tables
from prunelab.paper_tables.grids import Grid
from prunelab.paper_tables.join import Line, PaperTable, Value
from prunelab.paper_tables.tolerance import MEANS

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Report:
    """A paper's number. place: the table's page and fragment."""

    slug: str
    line: Line
    place: str


@dataclass(frozen=True)
class Quantity:
    """One method on one model at one budget, by one metric, with all that papers report of it."""

    model: str
    budget: str
    method: str
    options: str
    metric: str
    reports: tuple[Report, ...]

    @property
    def ours(self) -> Value:
        """What its run gives here, or lacks."""
        return self.reports[0].line.reproduced

    @property
    def ready(self) -> str:
        """The command that makes it, where it waits."""
        return self.reports[0].line.ready

    @property
    def values(self) -> list[float]:
        """The distinct values that are reported, from low to high."""
        return sorted({report.line.reported.value for report in self.reports})

    @property
    def papers(self) -> list[str]:
        """Who reports it."""
        return list(dict.fromkeys(report.slug for report in self.reports))

    @property
    def spread(self) -> float:
        """How far the reports disagree."""
        return self.values[-1] - self.values[0]

    @property
    def allowed(self) -> float:
        """How far they may, by the tolerances of the two that lie farthest apart."""
        ordered = sorted(self.reports, key=lambda report: report.line.reported.value)
        return sum(r.line.tolerance.value for r in (ordered[0], ordered[-1]) if r.line.tolerance)

    @property
    def disagrees(self) -> bool:
        """Whether papers report it farther apart than rounding and sampling explain."""
        return len(self.papers) > 1 and self.spread > self.allowed + 1e-9

    @property
    def shown(self) -> str:
        """The reports in one cell: a number, or from where to where."""
        texts = {r.line.reported.value: r.line.reported.text for r in self.reports}
        ends = [texts[value] for value in (self.values[0], self.values[-1])]
        return ends[0] if len(self.values) == 1 else f"{ends[0]} to {ends[1]}"


@dataclass(frozen=True)
class Shelf:
    """Everything reported of one model under one budget."""

    model: str
    budget: str
    quantities: tuple[Quantity, ...]

    @property
    def name(self) -> str:
        """Of its fragment."""
        return tables.identifier(self.budget)

    @cached_property
    def metrics(self) -> list[str]:
        """The columns, those with most numbers first."""
        counts = Counter(q.metric for q in self.quantities)
        return [metric for metric, _ in counts.most_common()]

    @cached_property
    def rows(self) -> list[tuple[str, str, dict[str, Quantity]]]:
        """Method, options, and what is reported of them by metric."""
        results: dict[tuple[str, str], dict[str, Quantity]] = {}
        for quantity in self.quantities:
            results.setdefault((quantity.method, quantity.options), {})[quantity.metric] = quantity
        order = sorted(results, key=lambda key: (key[0] != UNPRUNED, *key))
        return [(*key, results[key]) for key in order]

    @property
    def reports(self) -> int:
        """How many numbers papers print here."""
        return sum(len(q.reports) for q in self.quantities)

    @property
    def joined(self) -> int:
        """How many quantities several papers report."""
        return sum(len(q.papers) > 1 for q in self.quantities)

    @property
    def disagreements(self) -> int:
        """How many of those disagree."""
        return sum(q.disagrees for q in self.quantities)

    @property
    def made(self) -> int:
        """How many have a number of ours."""
        return sum(q.ours.value is not None for q in self.quantities)


@dataclass(frozen=True)
class Literature:
    """Shelves by model, the models with most numbers first."""

    shelves: Mapping[str, Sequence[Shelf]]

    @cached_property
    def quantities(self) -> list[Quantity]:
        """All of them."""
        return [q for shelves in self.shelves.values() for shelf in shelves for q in shelf.quantities]

    @cached_property
    def disagreements(self) -> list[Quantity]:
        """Those that papers disagree on, the farthest beyond what is allowed first."""
        return sorted((q for q in self.quantities if q.disagrees), key=lambda q: q.allowed - q.spread)

    @property
    def facts(self) -> dict[str, int]:
        """In figures."""
        every = self.quantities
        methods = {(q.model, q.method, q.options, q.budget) for q in every if len(q.papers) > 1}
        return {
            "numbers": sum(len(q.reports) for q in every),
            "quantities": len(every),
            "reported by several papers": sum(len(q.papers) > 1 for q in every),
            "methods with several reports": len(methods),
            "disagreements beyond tolerance": len(self.disagreements),
            "with a number of ours": sum(q.ours.value is not None for q in every),
        }


def of(plan: Plan, shown: Iterable[tuple[str, Sequence[tuple[str, PaperTable]]]]) -> Literature:
    """The literature of a plan's papers, given with their tables by file names."""
    groups: dict[tuple[str, str, str], list[tuple[Run, str, Report]]] = {}
    for slug, named in shown:
        places = {table.name: f"{slug}/index.html#{slug}-{name}" for name, table in named}
        lines = {(t.name, v.reported.row, v.reported.column): v for _, t in named for v in t.lines}
        for cell in plan.cells(slug):
            run, number = cell.runs.get("paper"), cell.reported
            model = next((name for kind, name in run.names if kind == "model"), "") if isinstance(run, Run) else ""
            if isinstance(run, Run) and run.scale == "paper" and model and cell.status == "measured":
                line = lines[number.table, number.row, number.column]
                report = Report(slug, line, places[number.table])
                groups.setdefault((model, run.identity, cell.metric), []).append((run, cell.metric, report))
    labels = _labels(groups.values())
    cells: dict[tuple[str, ...], list[tuple[Run, Quantity]]] = {}
    for (model, _, metric), group in groups.items():
        run = group[0][0]
        quantity = Quantity(
            published(model), budget(run, model), run.method or UNPRUNED, _options(run), labels[_column(run, metric)],
            tuple(report for *_, report in group),
        )  # fmt: skip
        place = (quantity.model, quantity.budget, quantity.method, quantity.options, quantity.metric)
        cells.setdefault(place, []).append((run, quantity))
    results: dict[str, dict[str, list[Quantity]]] = {}
    for found in cells.values():
        for quantity in _distinct(found):
            results.setdefault(quantity.model, {}).setdefault(quantity.budget, []).append(quantity)
    shelves = {
        model: [Shelf(model, options, tuple(quantities)) for options, quantities in sorted(by.items(), key=_most)]
        for model, by in results.items()
    }
    return Literature(dict(sorted(shelves.items(), key=lambda pair: -sum(s.reports for s in pair[1]))))


def _most(pair: tuple[str, Sequence[Quantity]]) -> tuple[bool, int, str]:
    return pair[0] != UNPRUNED, -sum(len(q.reports) for q in pair[1]), pair[0]


def published(model: str) -> str:
    """The name under which a model of the catalogue is known."""
    paper = lookup.model(model).get("paper", {})
    return str(paper.get("hub", model)).partition("/")[2].removesuffix("-hf") or model


def budget(run: Run, model: str) -> str:
    """A budget as readers count it: of visual tokens that many of how many, of anything else as papers write it."""
    if run.method is None or run.budget is None:
        return UNPRUNED if run.method is None else "no budget"
    size, frames = sizes.of(model), run.settings.get("frames")
    whole = 0
    if size and registry.entry(run.method).role == "token_pruner":
        whole = round(frames * size.frame_tokens) if frames and size.frame_tokens else size.input_tokens
    parsed = Budget.parse(run.budget)
    if not whole or len(parsed.amounts) > 1 or parsed.unit not in ("ratio", "count"):
        return run.budget
    kept = parsed.amounts[0] * (whole if parsed.unit == "ratio" else 1)
    return f"{kept:.0f} of {whole} tokens"


def _options(run: Run) -> str:
    options = [f"{key}={value}" for key, value in run.options.items()]
    return ", ".join([*options, *(["budget matched in the mean"] if run.settings.get("match") else [])])


def _distinct(found: Sequence[tuple[Run, Quantity]]) -> list[Quantity]:
    """Quantities that would stand in one cell, by runs of other conditions: these join the options, so that each has a
    row."""
    if len(found) == 1:
        return [quantity for _, quantity in found]
    conditions = [_conditions(run) for run, _ in found]
    keys = [key for key in dict.fromkeys(k for c in conditions for k in c) if len({c.get(key) for c in conditions}) > 1]
    labels = [", ".join(f"{key}={c[key]}" if key in c else f"no {key}" for key in keys) for c in conditions]
    results: list[Quantity] = []
    for place, (_, quantity) in enumerate(found):
        earlier = labels[:place].count(labels[place])  # other weights or data behind the same names
        own = ", ".join(filter(None, [quantity.options, labels[place], f"run {earlier + 1}" if earlier else ""]))
        results.append(replace(quantity, options=own))
    return results


def _conditions(run: Run) -> dict[str, str]:
    """What a run was made under, beside its method and data: settings, the budget as papers write it, and by name what
    else it reads."""
    read = {of: name for of, (_, name) in zip(run.ids, run.names, strict=True) if not _is_data(of)}
    given = {key: str(value) for key, value in run.settings.items()}
    return given | read | ({} if run.budget is None else {"budget": run.budget})


def _is_data(of: str) -> bool:
    """Whether what is read under this name is what the model is measured on."""
    return of == "data" or of.startswith("data of ")


def _column(run: Run, metric: str) -> tuple[str, ...]:
    """What makes two metrics one column: the task, what it is measured on, and for a mean the scores behind it."""
    data = [name for of, (_, name) in zip(run.ids, run.names, strict=True) if _is_data(of)]
    part = str(run.settings.get("task") or "")
    members = run.settings.get("average", ()) if metric in MEANS else ()
    return (run.task, metric, *data, part, *map(str, members), str(run.settings.get("frames", "")))


def _labels(groups: Iterable[Sequence[tuple[Run, str, Report]]]) -> dict[tuple[str, ...], str]:
    """A name for each column: what papers call it; where they call it by several names, its measure with its data set
    or what most of them call it; with what tells it apart where two are called alike."""
    called: dict[tuple[str, ...], Counter[str]] = {}
    for group in groups:
        for run, metric, report in group:
            called.setdefault(_column(run, metric), Counter())[report.line.reported.column] += 1
    names = {
        key: (_named(key) if len(counts) > 1 else "") or counts.most_common(1)[0][0] for key, counts in called.items()
    }
    twice = Counter(names.values())
    results: dict[tuple[str, ...], str] = {}
    taken: Counter[str] = Counter()
    for key, name in names.items():
        label = name if twice[name] == 1 else f"{name} ({_apart(key)})"
        taken[label] += 1
        results[key] = label if taken[label] == 1 else f"{label}, {taken[label]}"
    return results


def _named(key: tuple[str, ...]) -> str:
    """The measure with the one data set that it is taken on, for tasks that read one: papers may have models or shares
    above such columns. '' for others."""
    task, metric, *rest = key
    reads = tasks.get(task).reads
    if "data" not in reads or "own data" in reads or metric in MEANS:
        return ""
    data, part, *_ = rest
    return ", ".join(filter(None, [tasks.get(task).metric(metric).words, data, part.replace("_", " ")]))


def _apart(key: tuple[str, ...]) -> str:
    """What tells a column from one that papers call alike: the sets behind it, or the measure."""
    task, metric, *data, frames = key
    if metric in MEANS:
        return f"over {sum(' ' in part for part in data)} tasks"
    words = tasks.get(task).metric(metric).words.partition(" ")[2] or metric
    return words.replace("_", " ") + (f", {frames} frames" if frames else "")


# -- to take along ---------------------------------------------------------------------------------------------------


def csv(quantities: Iterable[Quantity]) -> str:
    """Their numbers, one a line."""
    header = (
        "model", "budget", "method", "options", "metric", "paper", "table", "row", "column", "reported", "unit",
        "source", "reproduced", "disagrees",
    )  # fmt: skip
    rows = (
        (
            q.model, q.budget, q.method, q.options, q.metric, r.slug, r.line.reported.table, r.line.reported.row,
            r.line.reported.column, r.line.reported.text, r.line.reported.unit, r.line.reported.source, q.ours.value,
            q.disagrees,
        )
        for q in quantities
        for r in q.reports
    )  # fmt: skip
    return tables.csv_text(header, rows)


def grid(literature: Literature) -> Grid:
    """What papers disagree on."""
    rows = [
        [q.model, q.budget, f"{q.method} {q.options}".strip(), q.metric, q.shown, f"{q.spread:.3g}", f"{q.allowed:.2g}",
         "; ".join(f"{r.slug} {r.line.reported.text}" for r in q.reports)]
        for q in literature.disagreements
    ]  # fmt: skip
    header = ["model", "budget", "method", "metric", "reported", "apart", "allowed", "by"]
    right = [name in ("apart", "allowed") for name in header]
    head = ["Numbers of one method that papers report farther apart than rounding and sampling explain."]
    return Grid("disagreements", head, header, right, rows)
