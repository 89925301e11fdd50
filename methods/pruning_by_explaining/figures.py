"""The toy experiments as curves: what accuracy is left, against the samples that a criterion reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prunelab.common.drawing import svg
from prunelab.common.drawing.figures import Context, Figure

NAMES = {"lrp": "relevance", "taylor": "Taylor", "grad": "gradient", "weight": "weight"}
SETS = {"circle": "two circles", "moon": "two half moons", "mult": "four arms of a spiral"}


def figures(context: Context) -> list[Figure]:
    """The curves, where their run has been made."""
    return context.drawn("toy", "Accuracy after a third of the units has left", charts)


def charts(metrics: Mapping[str, Any]) -> str:
    """One chart a set of points, with samples a class on a logarithmic axis and 95 % intervals."""
    drawn = []
    for data, title in SETS.items():
        series = []
        for label, name in NAMES.items():
            marks = []
            for samples in (1, 2, 5, 10, 20, 50, 100, 200):
                cell = metrics[f"toy post-pruning/{data} {label} n={samples} per class/train accuracy"]
                words = f"{name}, {samples} a class: {cell['value']:.2f} %"
                marks.append(svg.Mark(math.log2(samples), cell["value"], 1.96 * cell["stderr"], label=words))
            series.append(svg.Series(name, tuple(marks)))
        level = ("unpruned", float(metrics[f"toy post-pruning/{data} unpruned/train accuracy"]["value"]))
        drawn.append(
            svg.chart(series, title=title, x_label="samples a class, log2", y_label=f"accuracy, {title}", level=level)
        )
    return "".join(drawn)
