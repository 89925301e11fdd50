"""The pictures of a paper's page: its boards as curves, how its trainings went, and what its own `figures.py` adds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from prunelab.common.drawing import svg
from prunelab.common.drawing.figures import Context, Curves, Figure
from prunelab.common.experiments import papers
from prunelab.common.experiments.plans import Plan
from prunelab.common.experiments.run import Run
from prunelab.paper_tables import tables
from prunelab.paper_tables.join import BoardTable, Line, Records


def hook(slug: str) -> ModuleType | None:
    """The paper's own `figures.py`, where it has one."""
    if not (papers.METHODS / slug / "figures.py").exists():
        return None
    return importlib.import_module(f"prunelab.methods.{slug}.figures")


def of(
    slug: str, plan: Plan, lines: Sequence[Line], boards: Sequence[BoardTable], records: Records
) -> tuple[list[Figure], list[str]]:
    """A paper's figures, and the addresses of the runs that were made for figures alone."""
    runs = plan.figures(slug)

    def record(run: Run | str) -> Mapping[str, Any] | None:
        return None if isinstance(run, str) else records.get(run)[0]

    context = Context(slug, plan.config, lines, boards, runs, record)
    own = hook(slug)
    curves: Mapping[str, Curves] = own.curves(context) if own and hasattr(own, "curves") else {}
    result = trade_off(boards, curves) + trainings(boards, records)
    if own and hasattr(own, "figures"):
        result += own.figures(context)
    made = [r for r in map(record, (job.run for job in runs)) if r is not None]
    return result, [f"{r['identity']}-{r['sources']}" for r in made]


def trade_off(boards: Sequence[BoardTable], reported: Mapping[str, Curves]) -> list[Figure]:
    """Each board as curves of quality against cost; what the paper reports stands in a panel and on axes of its own."""
    results = []
    for name in dict.fromkeys(board.name for board in boards):
        same = [b for b in boards if b.name == name and b.scale != "analytic"]  # exact costs need no curve
        shown = [b for b in same if any(p.value.value is not None and p.cost for p in b.points)]
        if not shown and name not in reported:
            continue
        ours = [_curves(board) for board in shown]
        theirs = reported.get(name)
        look = svg.styles(
            s.name for c in [*(curves for curves, _ in ours), *([theirs] if theirs else [])] for s in c.series
        )
        panels = [_panel("Reported by the paper", theirs, None, look)] if theirs else []
        for board, (curves, level) in zip(shown, ours, strict=True):
            where = (
                "Our run, paper scale"
                if board.scale == "paper"
                else f"Our run, {board.scale}: a stand-in, not the paper's data"
            )
            panels.append(_panel(where, curves, level, look))
        caption = next(b.caption for b in boards if b.name == name)
        if theirs and any(m.hollow for s in theirs.series for m in s.marks):
            caption += " Hollow marks were read off the paper's figure by eye."
        if shown:
            caption += " Bars are 95 % intervals of each value alone; the table below has the paired differences."
        if theirs and shown:
            caption += " The panels have different models, data and axes and do not compare."
        results.append(Figure(name, f'<div class="panels">{"".join(panels)}</div>', caption))
    return results


def trainings(boards: Sequence[BoardTable], records: Records) -> list[Figure]:
    """What the methods of each board that train saw on their way: their own loss, and the parameters that stay."""
    results = []
    for name in dict.fromkeys(board.name for board in boards):
        shown = [(board.scale, logs) for board in boards if board.name == name and (logs := _logs(board, records))]
        panels = []
        for scale, logs in shown:
            look, points = svg.styles(logs), [point for log in logs.values() for point in log]
            drawn = [("loss", "loss", 1.0)]
            if all("parameters" in p for p in points) and len({p["parameters"] for p in points}) > 1:
                drawn.append(("parameters", "parameters that masks leave, M", 1e6))
            for key, label, unit in drawn:
                series = [
                    svg.Series(entry, tuple(svg.Mark(point["step"], point[key] / unit) for point in log))
                    for entry, log in logs.items()
                ]
                panels.append(_panel(f"By steps, {scale}", Curves("step", label, series), None, look))
        if panels:
            caption = (
                "From the training logs of this board's runs, the first seed of each. The loss is a mean over the last"
                " fifty steps or so, with all that a method adds to it, so that losses of two methods do not compare."
            )
            results.append(Figure(f"training: {name}", f'<div class="panels">{"".join(panels)}</div>', caption))
    return results


def _logs(board: BoardTable, records: Records) -> dict[str, list[dict[str, float]]]:
    """The training logs of a board, by entry and budget."""
    results = {}
    for point in board.points:
        metrics = {} if point.value.record is None else records.at(point.value.record)["metrics"]
        if log := metrics.get("training_loss", {}).get("log"):
            results[" at ".join(filter(None, (point.entry, point.budget)))] = log
    return results


def _curves(board: BoardTable) -> tuple[Curves, tuple[str, float] | None]:
    """A board's points by entry, and the level of its baseline."""
    base = board.points[0]
    points = [p for p in board.points[1:] if p.value.value is not None and p.cost]
    millions = bool(points) and max(p.cost or 0.0 for p in points) < 0.1
    curves: dict[str, list[svg.Mark]] = {}
    alone: dict[str, list[svg.Mark]] = {}  # patterns are no points of a curve over shares
    for p in points:
        assert p.value.value is not None and p.cost is not None
        label = f"{p.entry} at {p.budget}: {tables.shown(p.value, 1)}, {tables.cost(p.cost)} {board.cost}"
        mark = svg.Mark(p.cost * (1000 if millions else 1), p.value.value, p.value.margin, label=label)
        (alone if ":" in (p.budget or "") else curves).setdefault(p.entry, []).append(mark)
    series = [svg.Series(entry, tuple(marks)) for entry, marks in curves.items()]
    series += [svg.Series(entry, tuple(marks), joined=False) for entry, marks in alone.items()]
    level = None if base.value.value is None else (f"{base.entry} {base.value.value:.1f}", base.value.value)
    unit = f"{'M' if millions else 'G'} {board.cost}" + (" an image, scoring included" if "MACs" in board.cost else "")
    return Curves(unit, board.metric, series), level


def _panel(title: str, curves: Curves, level: tuple[str, float] | None, look: Mapping[str, int]) -> str:
    drawn = svg.chart(
        curves.series, title=title, x_label=curves.x_label, y_label=curves.y_label, level=level, look=look
    )
    return f'<div class="panel"><h5>{svg.escape(title)}</h5>{drawn}</div>'
