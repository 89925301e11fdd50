"""What the paper reports of the method alone: the memory of its table."""

from __future__ import annotations

from prunelab.methods.token_recycling.method import TokenRecycling

VICUNA = 32000  # tokens of Vicuna's vocabulary
WIDTH, INNER = 4096, 11008  # of Vicuna-7B
HALF = 2  # bytes


def memory() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": MiB of the table for Vicuna, or of EAGLE's layer for it}."""
    attention, mlp, norm, join = 4 * WIDTH**2, 3 * WIDTH * INNER, WIDTH, 2 * WIDTH**2 + WIDTH
    eagle = {"value": HALF * (attention + mlp + norm + join) / 2**20}
    table = {"value": TokenRecycling().start(VICUNA).table.nbytes / 2**20}
    return {f"vs-eagle-7B/{row}/Memory": value for row, value in (("TR", table), ("Eagle1", eagle), ("Eagle2", eagle))}
