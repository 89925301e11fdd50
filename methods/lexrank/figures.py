"""LexRank's own picture: a document with its sentence graph and scores."""

from __future__ import annotations

from prunelab.common.drawing.figures import Context, Figure


def figures(context: Context) -> list[Figure]:
    """The sentence graph, where its run has been made."""
    figures = []
    for job in context.runs:
        record = context.record(job.run)
        if record is not None:
            figures.append(
                Figure("A document as a graph of its sentences", record["metrics"]["graph"]["html"], job.figure.caption)
            )
    return figures
