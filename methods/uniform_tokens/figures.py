"""What is still answered against what is still seen, for all methods of the page's comparison."""

from __future__ import annotations

from prunelab.common.drawing.figures import Context, Figure

BOARD = "questions about pictures"


def figures(context: Context) -> list[Figure]:
    """Accuracy against kept tokens, from the runs of the comparison."""
    caption = "Answers against the visual tokens that a layer of the decoder sees of a picture, with 95 % intervals."
    return context.against(BOARD, f"{BOARD}, tokens", "Accuracy against kept tokens", caption)
