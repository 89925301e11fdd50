"""Accuracy of networks trained sparse, by how the densities of their layers were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunelab.common.drawing import svg
from prunelab.common.drawing.figures import Context, Figure


def figures(context: Context) -> list[Figure]:
    """The chart, where its run has been made."""
    return context.drawn("sparse", "Sparse from the start, under random masks", chart)


def chart(metrics: Mapping[str, Any]) -> str:
    marks: dict[str, list[svg.Mark]] = {}
    for name, cell in metrics.items():
        ratio, density, _ = name.split("/")
        label = f"{ratio} at {density}: {cell['value']:.1f} %"
        mark = svg.Mark(100 * float(density), cell["value"], 1.96 * cell["stderr"], label=label)
        marks.setdefault(ratio, []).append(mark)
    level = ("dense", float(marks.pop("dense")[0].y))
    series = [svg.Series(ratio, tuple(result)) for ratio, result in marks.items()]
    label = "weights that stay, %"
    return svg.chart(series, title="Densities by layer", x_label=label, y_label="accuracy, %", level=level)
