"""Accuracy of small networks by when their weights were pruned, and what they then began from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunelab.common.drawing import svg
from prunelab.common.drawing.figures import Context, Figure


def figures(context: Context) -> list[Figure]:
    """The chart, where its run has been made."""
    return context.drawn("trainings", "Before or after a training, from scratch or fine-tuned", chart)


ARMS = {
    "initialised": "pruned as initialised",
    "from scratch": "pruned after a training, from scratch",
    "fine-tuned": "pruned after a training, fine-tuned",
}


def chart(metrics: Mapping[str, Any]) -> str:
    series = []
    for place, (arm, label) in enumerate(ARMS.items(), 1):
        cell = metrics[arm]
        words = f"{label}: {cell['value']:.1f} %"
        series.append(svg.Series(label, (svg.Mark(float(place), cell["value"], 1.96 * cell["stderr"], label=words),)))
    level = (f"dense {metrics['dense']['value']:.1f}", float(metrics["dense"]["value"]))
    return svg.chart(series, title="Accuracy by arm", x_label="arm", y_label="accuracy, %", level=level)
