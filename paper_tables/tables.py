"""The tables as CSV, for machines, and as grids of text, for readers."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence

from prunelab.common.core.errors import PrunelabError
from prunelab.paper_tables.grids import Grid, Notes
from prunelab.paper_tables.join import BoardTable, Line, Outcome, PaperTable, Value
from prunelab.paper_tables.tolerance import decimals

SHAPES: dict[Outcome, str] = {
    "within": "●", "off": "▲", "assumed": "□", "stale": "◌", "ready": "○", "stand-in": "◇", "not run": "–",
}  # fmt: skip
WORDS: dict[Outcome, str] = {
    "within": "within tolerance",
    "off": "off",
    "assumed": "under an assumption",
    "stale": "stale",
    "ready": "ready",
    "stand-in": "stand-in only",
    "not run": "not run",
}
KEPT = (
    "Kept is the share of the visual tokens that a layer saw, in the mean over layers, whatever the row's budget means."
)
COUNTS = (
    "A cost is reproduced as the paper counts it; our count is in multiply-adds of matrix products alone, of a prompt"
    " those of the decoder, with the method's scoring included and named."
)
ASSUMED = (
    "What runs under an assumption decides something that the source does not say; its difference is shown and not"
    " judged."
)
STAND_IN = "stand-in"  # what a number of another scale is: never the paper's, whatever it comes to

_LINE = ("table", "row", "column", "reported", "unit", "source", "quality")
_OURS = (
    "reproduced",
    "difference",
    "tolerance",
    "tolerance_from",
    "within_tolerance",
    "status",
    "needs",
    "assumes",
    "record",
    "our_gmacs",
    "our_scoring_gmacs",
    "our_cache_mib",
    "our_record",
)
_SCALE = ("", "_stderr", "_samples", "_record", "_status")
_POINT = ("entry", "budget", "scale", "value", "stderr", "samples", "gmacs", "saving", "difference", "interval")


def identifier(name: str) -> str:
    """A table's or board's name as a file name and fragment."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "table"


def file_names(tables: Iterable[PaperTable], boards: Iterable[BoardTable]) -> list[str]:
    """Names without suffix, tables first. Two that fall together are an error, as one would overwrite the other."""
    names = [identifier(t.name) for t in tables] + [f"{identifier(b.name)}-{b.scale}" for b in boards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PrunelabError(f"two tables would be written to {twice[0]}.csv; give them names that differ in letters")
    return names


def scales(table: PaperTable) -> list[str]:
    """Scales beside the paper's at which a line of this table has a number, or lacks one for a reason of its own."""
    return list(
        dict.fromkeys(
            scale
            for line in table.lines
            for scale, v in line.others.items()
            if v.value is not None or (v.status.startswith("not run: needs") and v.status != line.reproduced.status)
        )
    )


# -- CSV -------------------------------------------------------------------------------------------------------------


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{round(value, 6):.10g}" if isinstance(value, float) else str(value)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Values as CSV: empty for None, ten significant digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def table_csv(table: PaperTable) -> str:
    """One line a reported number; the stand-ins have columns of their own."""
    others = scales(table)
    shown_values = [v for line in table.lines for v in (line.reproduced, *line.others.values())]
    protocols, keeps = any(v.protocol for v in shown_values), any(left(v) for v in shown_values)

    def row(line: Line) -> list[object]:
        r, own = line.reported, line.reproduced
        cells: list[object] = [r.table, r.row, r.column, r.text, r.unit, r.source, r.quality]
        cells += [own.value, line.difference, *(_tolerance(line)), line.within]
        how = own.status if own.value is not None else line.outcome
        cells += [how, own.needs, line.assumes, own.record]
        cells += (own.ours.gmacs, own.ours.scoring, own.ours.cache, own.ours.record) if own.ours else (None,) * 4
        for scale in others:
            v = line.others[scale]
            cells += [v.value, v.stderr, v.samples, v.record, v.status if v.value is None else STAND_IN]
        if protocols:
            cells += [own.protocol, *(line.others[scale].protocol for scale in others)]
        if keeps:
            cells += [own.kept, *(line.others[scale].kept for scale in others)]
        return cells

    header = [*_LINE, *_OURS, *(f"{scale}{part}" for scale in others for part in _SCALE)]
    if protocols:
        header += ["protocol", *(f"{scale}_protocol" for scale in others)]
    if keeps:
        header += ["kept", *(f"{scale}_kept" for scale in others)]
    return csv_text(header, map(row, table.lines))


def numbers_csv(lines: Iterable[tuple[str, Line]]) -> str:
    """Every reported number of papers, given with their slugs, one a line."""
    header = ("paper", "table", "row", "column", "reported", "unit", "outcome", "reproduced", "difference", "record")
    rows = (
        (slug, r.table, r.row, r.column, r.text, r.unit, line.outcome, own.value, line.difference, own.record)
        for slug, line in lines
        for r, own in [(line.reported, line.reproduced)]
    )
    return csv_text(header, rows)


def _tolerance(line: Line) -> tuple[float | None, str | None]:
    return (line.tolerance.value, line.tolerance.reason) if line.tolerance else (None, None)


def board_csv(board: BoardTable) -> str:
    """One line a point; `interval` is the half width of the paired difference's 95 % interval."""
    protocols, keeps = any(p.value.protocol for p in board.points), any(left(p.value) for p in board.points)
    return csv_text(
        (*_POINT, "status", "record", *(("protocol",) if protocols else ()), *(("kept",) if keeps else ())),
        (
            (
                p.entry, p.budget or "none", p.scale, p.value.value, p.value.stderr, p.value.samples, p.cost, p.saving,
                p.difference, p.interval, p.value.status if p.scale == "paper" or p.value.value is None else STAND_IN,
                p.value.record, *((p.value.protocol,) if protocols else ()), *((p.value.kept,) if keeps else ()),
            )
            for p in board.points
        ),
    )  # fmt: skip


# -- shown numbers ---------------------------------------------------------------------------------------------------


def shown(value: Value, places: int) -> str:
    """A value with the half width of its 95 % interval."""
    assert value.value is not None
    return f"{value.value:.{places}f}" + (f" ± {value.margin:.{places}f}" if value.margin is not None else "")


def left(value: Value) -> str:
    """What a run really kept, to stand behind a number of it; empty where it does not tell."""
    return "" if value.kept is None else f"kept {value.kept:.1f} %"


def counted(value: Value) -> str:
    """Our own count of a cost, with the method's scoring in it, and the cache of a decoder."""
    if value.ours is None:
        return "–"
    cache = "" if value.ours.cache is None else f", cache {value.ours.cache:.3g} MiB"
    return f"{value.ours.gmacs:.5g} G ({value.ours.scoring:.2g} scoring){cache}"


def signed(value: float, places: int) -> str:
    """A difference with its sign, a true minus."""
    text = f"{value:+.{places}f}"
    return f"{0:.{places}f}" if float(text) == 0 else text.replace("-", "−")


def places(line: Line) -> int:
    """Decimals to show a reproduction with: one more than the paper prints, so that rounding can be judged."""
    return min(decimals(line.reported.text) + 1, 4)


def fitting(value: Value) -> int:
    """Decimals to show a stand-in with: three significant digits, one decimal at least."""
    size = abs(value.value or 1.0)
    return max(1, min(6, 2 - math.floor(math.log10(size))))


def held(tolerance: float) -> str:
    """A tolerance as told in words."""
    return f"{tolerance:.2g}" if tolerance < 10 else f"{tolerance:.4g}"


def status(line: Line) -> str:
    """The line's outcome in words, with the tolerance that it was held to."""
    how = line.reproduced.status
    if line.tolerance and line.outcome in ("within", "off"):
        most = f"±{held(line.tolerance.value)}"
        return f"{how}, within {most}" if line.within else f"{how}, off by more than {most}"
    if line.outcome == "assumed":
        return f"{how}, {WORDS['assumed']}"
    if line.outcome == "stale":
        return "stale: made by other sources than these"
    return WORDS[line.outcome]


def assumption(line: Line) -> str:
    """What the line's run takes for granted, in words."""
    return f"{WORDS['assumed']}: {line.assumes}"


def cost(value: float) -> str:
    """MACs given in G, in a unit that leaves few zeros."""
    return f"{value:.3f} G" if value >= 0.1 else f"{1000 * value:.2f} M"


# -- grids -----------------------------------------------------------------------------------------------------------


def tolerances(table: PaperTable) -> list[str]:
    """What the columns' numbers are held to and why, one text a reason."""
    results: dict[str, dict[str, list[float]]] = {}
    for line in table.lines:
        if line.tolerance:
            columns = results.setdefault(line.tolerance.reason, {})
            columns.setdefault(line.reported.column, []).append(line.tolerance.value)
    sentences = []
    for reason, columns in results.items():
        spans: dict[str, list[str]] = {}
        for column, values in columns.items():
            low, high = held(min(values)), held(max(values))
            spans.setdefault(f"±{low}" + (f" to ±{high}" if high != low else ""), []).append(column)
        limits = ", ".join(f"{span} ({', '.join(named)})" for span, named in spans.items())
        sentences.append(f"Tolerance {limits}: {reason}.")
    return sentences


def table_grid(slug: str, table: PaperTable) -> Grid:
    """One line a reported number, sources and reasons below."""
    others, notes = scales(table), Notes()
    own_counts = any(line.reproduced.ours for line in table.lines)

    def noted(text: str, value: Value) -> str:
        text += f", {left(value)}" if left(value) else ""
        return f"{text} {notes(value.protocol)}" if value.protocol else text

    again = repeats(table)

    def row(number: int, line: Line) -> list[str]:
        r, own, digits = line.reported, line.reproduced, places(line)
        cells = [r.row, r.column, f"{r.text} {r.unit} {notes(f'{r.source} ({r.quality})')}"]
        lacks = line.ready.partition("; ")[2] or own.status  # without the command, which every cell has its own of
        cells.append(noted(shown(own, digits), own) if own.value is not None else f"– {notes(lacks)}")
        if own_counts:
            protocols = f" {notes(own.ours.protocol)}" if own.ours and own.ours.protocol else ""
            cells.append(counted(own) + protocols)
        cells.append("–" if line.difference is None else signed(line.difference, digits))
        under = f" {notes(assumption(line))}" if line.assumes else ""
        cells.append(f"{SHAPES[line.outcome]} {status(line)}{under}")
        for scale in others:
            v = line.others[scale]
            if (number, scale) in again:
                cells.append(f"as above {notes(again[number, scale])}")
                continue
            samples = f" (n = {v.samples})" if v.samples else ""
            cells.append(noted(shown(v, fitting(v)) + samples, v) if v.value is not None else f"– {notes(v.status)}")
        return cells

    count = ["our count"] if own_counts else []
    header = ["row", "column", "reported", "reproduced", *count, "difference", "status"]
    header += [f"stand-in: {scale}" for scale in others]
    right = [name not in ("row", "column", "status") for name in header]
    legend = ["± is the 95 % half width. A stand-in is another model on other data, not the paper's number."]
    if any(line.assumes for line in table.lines):
        legend.append(ASSUMED)
    if own_counts:
        legend.append(COUNTS)
    if any(left(v) for line in table.lines for v in (line.reproduced, *line.others.values())):
        legend.append(KEPT)
    rows = [row(number, line) for number, line in enumerate(table.lines)]
    name = f"{slug}: {table.name}"
    return Grid(name, (table.caption, table.note), header, right, rows, [*legend, *tolerances(table)], notes.texts)


def printed_grid(slug: str, table: PaperTable) -> Grid:
    """The table as the paper lays it out, rows and columns in its order: the reported number, and ours behind it where
    there is one."""
    columns = list(dict.fromkeys(line.reported.column for line in table.lines))
    cells: dict[str, dict[str, str]] = {}
    for line in table.lines:
        own = f" ({shown(line.reproduced, places(line))})" if line.reproduced.value is not None else ""
        approximate = "≈" if line.reported.quality == "by-eye" else ""
        by = cells.setdefault(line.reported.row, {})
        by[line.reported.column] = f"{approximate}{line.reported.text}{own}"
    rows = [[row, *(by.get(column, "") for column in columns)] for row, by in cells.items()]
    legend = ["In brackets what Prunelab obtains at the paper's scale, with the 95 % half width where it has one."]
    made = any(line.reproduced.value is not None for line in table.lines)
    right = [False] + [True] * len(columns)
    return Grid(f"{slug}: {table.name}", (table.caption,), ["", *columns], right, rows, legend if made else ())


def repeats(table: PaperTable) -> dict[tuple[int, str], str]:
    """Stand-ins that an earlier line of the table has already shown, by line and scale: in words, of which. One model
    stands in for several, and its one number is no evidence on each."""
    first: dict[tuple[str | None, float | None, str], str] = {}
    results: dict[tuple[int, str], str] = {}
    for number, line in enumerate(table.lines):
        name = f"{line.reported.row}, {line.reported.column}"
        for scale, value in line.others.items():
            if value.value is not None and value.record is not None:
                earlier = first.setdefault((value.record, value.value, scale), name)
                if earlier != name:
                    results[number, scale] = f"the run of {earlier}, which stands in here as well"
    return results


def board_grid(slug: str, board: BoardTable) -> Grid:
    """One line a point of a board."""
    rows, notes = [], Notes()
    for p in board.points:
        value = shown(p.value, 2) if p.value.value is not None else f"– {notes(p.value.status)}"
        value += f", {left(p.value)}" if left(p.value) else ""
        value += f" {notes(p.value.protocol)}" if p.value.protocol else ""
        saving = "–" if p.saving is None else f"{p.saving:.1f} %"
        spent = ["–" if p.cost is None else cost(p.cost), saving] if board.costed else []
        rows.append([p.entry, p.budget or "none", value, *spent, gap(p.difference, p.interval)])
    costs = [board.cost, "saved"] if board.costed else []
    header = ["method", "budget", board.metric, *costs, f"difference to {board.points[0].entry}"]
    legend = ["± is the 95 % half width; differences are paired over the same samples."]
    if any(left(p.value) for p in board.points):
        legend.append(KEPT)
    scale = board.scale if board.scale == "analytic" else f"{board.scale} scale"
    right = [False, False] + [True] * (len(header) - 2)
    return Grid(f"{slug}: {board.name}, {scale}", (board.caption,), header, right, rows, legend, notes.texts)


def gap(difference: float | None, interval: float | None) -> str:
    """A paired difference with its interval; where that holds zero, the two are tied."""
    if difference is None or interval is None:
        return "–"
    return f"{signed(difference, 2)} ± {interval:.2f}" + (", tied" if abs(difference) <= interval else "")
