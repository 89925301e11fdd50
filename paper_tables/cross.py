"""Boards across papers: every method that ran on one model and data set, at one budget, beside every other.

The papers' own boards hold a few methods each. Their runs are joined here where model, data and metric are the same,
so that methods of different papers stand in one order. Nothing is run for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from prunelab.common import tasks
from prunelab.common.core import files
from prunelab.common.experiments import schema
from prunelab.common.metrics import uncertainty
from prunelab.paper_tables import tables
from prunelab.paper_tables.grids import Grid, Notes
from prunelab.paper_tables.join import BoardTable, Records, Value, saving

UNPRUNED = "unpruned"
OWN = ("calibration", "seeds")  # settings that a method has and the unpruned model has not


@dataclass(frozen=True)
class Entry:
    """One method under one budget. difference and interval are paired with the unpruned model, samples alike."""

    method: str
    options: str
    slug: str  # a paper whose board runs it
    budget: str | None
    value: Value
    cost: float | None
    saving: float | None
    difference: float | None
    interval: float | None
    result: dict[str, Any]  # the metric in its record, whose samples pair up


@dataclass(frozen=True)
class Leaderboard:
    """All methods that ran on one model and data set, judged by one metric; the unpruned model stands at every
    budget."""

    name: str  # of files, and fragment
    model: str
    data: str
    metric: str  # in words
    lower: bool  # whether less is better
    cost: str  # in words
    scale: str
    stands_for: str  # the papers' models that this one stands in for; empty at paper scale
    settings: str  # in words
    unpruned: Entry | None
    budgets: Mapping[str, Sequence[Entry]]  # best first

    @property
    def size(self) -> int:
        """Entries under all budgets."""
        return sum(map(len, self.budgets.values()))

    @property
    def title(self) -> str:
        """In one line."""
        return f"{self.model} on {self.data}: {self.metric}" if self.model else f"{self.data}: {self.metric}"

    @property
    def costed(self) -> bool:
        """Whether any entry has a cost beside its metric."""
        return any(p.cost is not None for entries in self.budgets.values() for p in entries)

    @property
    def reach(self) -> tuple[float, float]:
        """From the lowest to the highest end of all intervals."""
        values = [p.value for group in self.blocks.values() for p in group]
        ends = [v.value + s * (v.margin or 0.0) for v in values for s in (-1, 1) if v.value is not None]
        return min(ends), max(ends)

    @property
    def blocks(self) -> dict[str, list[Entry]]:
        """Every budget's entries with the unpruned model among them, best first."""
        extra = [self.unpruned] if self.unpruned else []
        return {b: sorted([*extra, *entries], key=self._rank) for b, entries in self.budgets.items()}

    @property
    def kept(self) -> list[str]:
        """What is told of kept records among the entries."""
        protocols = (entry.value.protocol for entries in self.blocks.values() for entry in entries)
        return list(dict.fromkeys(found[0] for text in protocols if (found := re.search("kept record.*", text))))

    @property
    def ranks(self) -> dict[str, list[str]]:
        """The places of every block's entries. Who lies within chance of the best of its group, by the 95 % interval of
        the difference over the same samples, has that one's place, marked `=`."""
        return {budget: _places(entries) for budget, entries in self.blocks.items()}

    def _rank(self, entry: Entry) -> tuple[float, str]:
        return (entry.value.value or 0.0) * (1 if self.lower else -1), entry.method


Point = tuple[str, BoardTable, str, str | None, dict[str, Any]]  # slug, board, entry, budget, record


def leaderboards(boards: Iterable[tuple[str, BoardTable]], records: Records) -> list[Leaderboard]:
    """Every group with two methods or more under one budget, from the papers' boards, given with their slugs."""
    groups: dict[str, list[Point]] = {}
    for slug, board in boards:
        task = tasks.get(board.board.task)
        if not task.scales or task.metric(board.board.metric).higher_is_better is None:
            continue  # exact sizes and costs say nothing of quality, and what has no better side makes no order
        for point in board.points:
            if point.value.record is None or point.value.value is None or point.value.status == "stale":
                continue
            record = {**records.at(point.value.record), "protocol": point.value.protocol}
            run = record["run"]
            same = (run["task"], run["scale"], run["ids"].get("model"), run["ids"].get("data"), _settings(run))
            key = files.digest((*same, board.board.metric, board.board.cost))
            groups.setdefault(key, []).append((slug, board, point.entry, point.budget, record))
    results = [leaderboard for leaderboard in map(_leaderboard, groups.values()) if leaderboard.budgets]
    sizes: Counter[tuple[str, str, str]] = Counter()
    for leaderboard in results:
        sizes[leaderboard.scale, leaderboard.model, leaderboard.data] += leaderboard.size
    results.sort(
        key=lambda c: (-sizes[c.scale, c.model, c.data], c.model, c.data, c.scale, -c.size, c.metric, c.settings)
    )
    taken: dict[str, int] = {}
    for i, leaderboard in enumerate(results):  # what differs in settings alone is told apart by a number
        taken[leaderboard.name] = taken.get(leaderboard.name, 0) + 1
        if taken[leaderboard.name] > 1:
            results[i] = replace(leaderboard, name=f"{leaderboard.name}-{taken[leaderboard.name]}")
    return results


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in run["settings"].items() if k not in OWN}


def _leaderboard(group: Sequence[Point]) -> Leaderboard:
    _, board, _, _, record = group[0]
    stated, run = board.board, record["run"]
    unique: dict[str, Point] = {}
    for point in group:
        unique.setdefault(point[-1]["identity"], point)
    base = next((r["metrics"][stated.metric] for *_, r in unique.values() if r["run"]["method"] is None), None)
    entries = [_entry(slug, label, budget, r, stated, base) for slug, _, label, budget, r in unique.values()]
    unpruned = next((p for p in entries if p.method == UNPRUNED), None)
    budgets: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry is not unpruned:
            budgets.setdefault(entry.budget or "none", []).append(entry)
    matched = {b: _distinct(result) for b, result in sorted(budgets.items()) if len({p.method for p in result}) > 1}
    models = dict.fromkeys(b.board.model for _, b, *_ in group if b.board.model)
    model, data = _named(run["ids"].get("model")), _named(run["ids"].get("data"))
    name = tables.identifier(" ".join((model, data, stated.metric, stated.cost, run["scale"])))
    stands = "" if run["scale"] == "paper" else ", ".join(models)
    settings = ", ".join(f"{k} {v}" for k, v in _settings(run).items())
    lower = not tasks.get(stated.task).metric(stated.metric).higher_is_better
    return Leaderboard(
        name, model, data, board.metric, lower, board.cost, run["scale"], stands, settings, unpruned, matched
    )


def _places(entries: Sequence[Entry]) -> list[str]:
    groups: list[list[Entry]] = []
    for entry in entries:
        gap = uncertainty.paired_difference(entry.result, groups[-1][0].result) if groups else None
        if gap and abs(gap[0]) <= gap[1]:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    results: list[str] = []
    for group in groups:
        results += [f"{len(results) + 1}{'=' * (len(group) > 1)}"] * len(group)
    return results


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Places whose methods would read the same are told apart by their options."""
    names = Counter(p.method for p in entries)
    return [replace(p, method=f"{p.method} ({p.options or 'defaults'})") if names[p.method] > 1 else p for p in entries]


def _entry(
    slug: str, label: str, budget: str | None, record: Mapping[str, Any], stated: schema.Board, base: Any
) -> Entry:
    run, figures = record["run"], record["metrics"]
    result = figures[stated.metric]
    address = f"{record['identity']}-{record['sources']}"
    value = Value(
        run["scale"], result["value"], result.get("stderr"), result.get("n"), address, None, record["protocol"]
    )
    paired = uncertainty.paired_difference(result, base) if base is not None and run["method"] is not None else None
    difference, interval = paired or (None, None)
    spent, saved = (figures.get(key, {}).get("value") for key in (stated.cost, saving(stated.cost)))
    options = ", ".join(f"{k}={v}" for k, v in run["options"].items())
    name = UNPRUNED if run["method"] is None else label
    return Entry(name, options, slug, budget, value, spent, saved, difference, interval, result)


def _named(identity: Mapping[str, Any] | None) -> str:
    """A model or data set in one or two words: its testbed, asset, checkpoint or loader."""
    if not identity:
        return ""
    if "package" in identity:
        return PurePath(identity["file"]).stem
    name = next(
        (identity[key] for key in ("testbed", "assets", "hub", "listed", "name", "loader", "file") if key in identity),
        "",
    )
    more = [word for word in ("dialect", "shuffled") if identity.get(word)]
    return " ".join([str(name).replace("_", " "), *more])


def grid(leaderboard: Leaderboard) -> Grid:
    """All budgets of a leaderboard, one block after the other."""
    notes, rows = Notes(), []
    for budget, entries in leaderboard.blocks.items():
        for rank, entry in zip(leaderboard.ranks[budget], entries, strict=True):
            note = notes(entry.value.protocol) if entry.value.protocol else ""
            spent = tables.cost(entry.cost) if entry.cost is not None else "–"
            saved = f"{entry.saving:.1f} %" if entry.saving is not None else "–"
            cells = [budget, rank, entry.method, f"{tables.shown(entry.value, 2)} {note}".strip(), spent, saved]
            rows.append([*cells, tables.gap(entry.difference, entry.interval)])
    header = ["budget", "place", "method", leaderboard.metric, leaderboard.cost, "saved", "difference to unpruned"]
    head = (
        f"{leaderboard.scale} scale" + (f", in place of {leaderboard.stands_for}." if leaderboard.stands_for else "."),
    )
    return Grid(leaderboard.title, head, header, [False, True, False, True, True, True, True], rows, (), notes.texts)


def csv(leaderboard: Leaderboard) -> str:
    """One line a method and budget."""
    results = [(budget, entry) for budget, entries in leaderboard.blocks.items() for entry in entries]
    header = ("budget", "method", "options", "paper", "value", "stderr", "samples", "cost", "saving", "difference")
    rows = (
        (
            b, p.method, p.options, p.slug, p.value.value, p.value.stderr, p.value.samples, p.cost, p.saving,
            p.difference, p.interval, p.value.record,
        )
        for b, p in results
    )  # fmt: skip
    return tables.csv_text((*header, "interval", "record"), rows)
