"""What a paper's own `methods/<slug>/figures.py` is given and gives back. Imports no torch.

The module may define `figures(context) -> list[Figure]`, shown on the paper's page, and
`curves(context) -> dict[str, Curves]`: by board name, the paper's own points to show beside the board.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunelab.common.drawing import svg
from prunelab.common.drawing.svg import Series

if TYPE_CHECKING:
    from prunelab.common.experiments import planning
    from prunelab.common.experiments.run import Run


@dataclass(frozen=True)
class Figure:
    """One picture of the page. `html` is shown as it is, so escape what data brings; title and caption are text."""

    title: str
    html: str
    caption: str = ""


@dataclass(frozen=True)
class Curves:
    """Points that a paper reports, with what its axes mean."""

    x_label: str
    y_label: str
    series: Sequence[Series]


@dataclass(frozen=True)
class Context:
    """A paper and what is known of it: its lines and boards (as paper_tables.join makes them), the runs of its
    figures, and `record(run)` for the record of a run, None where it has not run."""

    slug: str
    config: Mapping[str, Any]
    lines: Sequence[Any]
    boards: Sequence[Any]
    runs: Sequence[planning.FigureRun]
    record: Callable[[Run | str], Mapping[str, Any] | None]

    def drawn(self, name: str, title: str, draw: Callable[[Mapping[str, Any]], str]) -> list[Figure]:
        """The figures of paper.yaml with that name, drawn from the metrics of their runs where those are made."""
        made = [(job.figure, self.record(job.run)) for job in self.runs if job.figure.name == name]
        return [Figure(title, draw(record["metrics"]), figure.caption) for figure, record in made if record is not None]

    def against(self, quality: str, spent: str, title: str, caption: str = "") -> list[Figure]:
        """One metric of the same runs against another: the board `quality` over the board `spent`, entry by entry and
        scale by scale, with the baseline as a level. Entries without a budget have no place on the axis and are told
        in the caption."""
        results = []
        for board in (b for b in self.boards if b.name == quality):
            other = next((b for b in self.boards if (b.name, b.scale) == (spent, board.scale)), None)
            if other is None:
                continue
            across = {(p.entry, p.budget): p.value.value for p in other.points}
            marks: dict[str, list[svg.Mark]] = {}
            apart = []
            for p in board.points[1:]:
                x = across.get((p.entry, p.budget))
                if p.value.value is not None and p.budget is None:
                    apart.append(f" {p.entry.capitalize()}: {p.value.value:.1f}.")
                elif p.value.value is not None and x is not None:
                    label = f"{p.entry} at {p.budget}: {p.value.value:.1f}, {x:.1f}"
                    marks.setdefault(p.entry, []).append(svg.Mark(x, p.value.value, p.value.margin, label=label))
            base = board.points[0]
            level = None if base.value.value is None else (f"{base.entry} {base.value.value:.1f}", base.value.value)
            drawn = svg.chart(
                [Series(entry, tuple(points)) for entry, points in marks.items()],
                title=title,
                x_label=other.metric,
                y_label=board.metric,
                level=level,
            )
            if drawn:
                stand_in = "" if board.scale == "paper" else f" A stand-in: {board.scale} scale."
                results.append(Figure(title, drawn, caption + "".join(apart) + stand_in))
        return results
