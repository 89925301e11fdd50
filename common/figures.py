"""What a paper's own `methods/<slug>/figures.py` is given and gives back. Imports no torch.

The module may define `figures(context) -> list[Figure]`, shown on the paper's page, and
`curves(context) -> dict[str, Curves]`: by board name, the paper's own points to show beside the board.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import papers
from common.svg import Series


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
    runs: Sequence[papers.FigureRun]
    record: Callable[[papers.Run | str], Mapping[str, Any] | None]

    def drawn(self, name: str, title: str, draw: Callable[[Mapping[str, Any]], str]) -> list[Figure]:
        """The figures of paper.yaml with that name, drawn from the metrics of their runs where those are made."""
        made = [(job.figure, self.record(job.run)) for job in self.runs if job.figure.name == name]
        return [Figure(title, draw(record["metrics"]), figure.caption) for figure, record in made if record is not None]
