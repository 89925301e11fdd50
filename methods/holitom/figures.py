"""What is still answered against what is still seen, for all methods of the page's comparison, and what is left of the
testbed's videos."""

from __future__ import annotations

from prunelab.common.drawing import sheets
from prunelab.common.drawing.figures import Context, Figure

BOARD = "questions about videos"


def figures(context: Context) -> list[Figure]:
    """Accuracy against kept tokens, from the runs of the comparison, and videos with what is kept of them."""
    caption = "Answers against the visual tokens that a layer of the decoder sees of a video, with 95 % intervals."
    looks = context.drawn("looks", "What is left, and what is answered", lambda result: sheets.looks(result["looks"]))
    return context.against(BOARD, f"{BOARD}, tokens", "Accuracy against kept tokens", caption) + looks
