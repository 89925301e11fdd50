"""The law of the average number of parameters, on runs of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunelab.common.drawing import svg
from prunelab.common.drawing.figures import Context, Figure

POINTS = 24  # of the law's curve


def figures(context: Context) -> list[Figure]:
    """The chart, where its runs have been made."""
    return context.drawn("law", "Loss against the number of parameters", chart)


def chart(metrics: Mapping[str, Any]) -> str:
    """Dense runs with the law that fits them, and sparse runs at their average and at their last number."""
    marks: dict[str, list[svg.Mark]] = {}
    for column, words in (("average", "average"), ("last", "last")):
        for kind in ("dense", "sparse") if column == "average" else ("sparse",):
            name = "dense" if kind == "dense" else f"sparse, {words} number"
            for run in sorted({key.split("/")[1] for key in metrics if key.startswith(f"{kind}/")}):
                n, loss = (float(metrics[f"{kind}/{run}/{figure}"]["value"]) for figure in (column, "loss"))
                label = f"{name}: {n:,.0f} parameters, loss {loss:.3f}"
                marks.setdefault(name, []).append(svg.Mark(n / 1000, loss, label=label))
    e, a, alpha = (float(metrics[f"law//{name}"]["value"]) for name in ("e", "a", "alpha"))
    reach = [mark.x for results in marks.values() for mark in results]
    low, high = min(reach), max(reach)
    places = [low * (high / low) ** (i / (POINTS - 1)) for i in range(POINTS)]
    curve = svg.Series("law of the dense runs", tuple(svg.Mark(x, e + a / (1000 * x) ** alpha) for x in places))
    series = [svg.Series(name, tuple(results), joined=False) for name, results in marks.items()]
    label = "parameters of linears, thousands"
    return svg.chart([*series, curve], title="The law", x_label=label, y_label="loss on held-out text, nats a byte")
