"""The worked example of the authors' figure, recomputed from the losses and probabilities that it prints."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

EXAMPLE = Path(__file__).with_name("worked_example.csv")


def worked_example() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}: loss times (1 - P) times the caption's factor.

    The factor, k over the sum of weights, needs the whole caption, of which the figure shows some tokens; it is the one
    of least squares over these.
    """
    with EXAMPLE.open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = {}
    for caption in sorted({row["caption"] for row in rows}):
        shown = [row for row in rows if row["caption"] == caption]
        loss, probability, printed = (np.array([float(row[c]) for row in shown])
                                      for c in ("loss", "probability", "weighed"))  # fmt: skip
        bare = loss * (1 - probability)
        factor = (bare @ printed) / (bare @ bare)
        for row, value in zip(shown, (factor * bare).tolist(), strict=True):
            metrics[f"figure worked example/{row['row']}/PRIOR loss"] = {"value": value}
    return metrics
