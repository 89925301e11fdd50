"""Tables 1 and 2 of the paper, recomputed from the cosines that it prints for one DUC 2004 cluster (d1003t).

The Centroid column of Table 2 needs the words of the cluster, which are licensed; it is not recomputed.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from prunelab.common.ranking.text import Array, threshold_graph
from prunelab.methods.lexrank.method import degree_centrality, lexrank

EXAMPLE = Path(__file__).with_name("worked_example.csv")


def cosines(adjusted: bool = False) -> tuple[list[str], Array]:
    """Labels of the 11 sentences and their cosines [11, 11] as printed, to two decimals.

    `adjusted` raises the two pairs printed as 0.20 that must lie above 0.2 for the paper's column t=0.2 to hold.
    """
    with EXAMPLE.open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = list(dict.fromkeys(row["second"] for row in rows))
    matrix = np.zeros((len(labels), len(labels)))
    for row in rows:
        i, j = labels.index(row["first"]), labels.index(row["second"])
        matrix[i, j] = matrix[j, i] = float((adjusted and row["cosine_for_0.2"]) or row["cosine"])
    return labels, matrix


def worked_example() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}, for the degrees and the LexRank scores."""
    metrics = {}
    for threshold in (0.1, 0.2, 0.3):
        labels, matrix = cosines(adjusted=threshold == 0.2)
        graph = threshold_graph(matrix, threshold)
        scores = lexrank(graph)
        for table, column, values in (
            ("T1", "degree", degree_centrality(graph)),
            ("T2 (max-normalised)", "LexRank", scores / scores.max()),
        ):
            for label, value in zip(labels, values.tolist(), strict=True):
                metrics[f"{table}/{label}/{column} t={threshold:g}"] = {"value": value}
    return metrics
