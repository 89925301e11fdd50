"""What the paper reports of the method alone: the memory of its table."""

from __future__ import annotations

from prunelab.methods.token_recycling.method import TokenRecycling

VICUNA = 32000  # tokens of Vicuna's vocabulary


def memory() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": MiB of the table for Vicuna}."""
    return {"vs-eagle-7B/TR/Memory": {"value": TokenRecycling().start(VICUNA).table.nbytes / 2**20}}
