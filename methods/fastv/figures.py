"""What is left of the testbeds' pictures and videos."""

from __future__ import annotations

from prunelab.common.drawing import sheets
from prunelab.common.drawing.figures import Context, Figure


def figures(context: Context) -> list[Figure]:
    """Kept tokens with the answers, where the runs have been made."""
    return context.drawn("looks", "What is left, and what is answered", lambda metrics: sheets.looks(metrics["looks"]))
