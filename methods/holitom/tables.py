"""The cost columns of the main table, by the paper's formula: 4nd^2 + 2n^2d + 2ndm a layer, for visual tokens alone."""

from __future__ import annotations

import math

from prunelab.common.costs.formulas import ONEVISION_7B, prefill_flops

FRAMES, CELLS = 32, 196  # tokens of a frame after pooling
LAYER, GOES_ON = 18, 0.5  # K, and the share that goes on from there
MAIN = "main LLaVA-OV-7B"
BEFORE = ("VisionZip", "PruneVid", "FastVID", "HoliTom w/o M")  # methods that shorten what the decoder reads


def entering(percent: int) -> int:
    """Tokens that enter the decoder: the share of a frame rounded up, as if nothing repeated."""
    return FRAMES * math.ceil(round(CELLS * percent / 100, 6))


def stages(row: str) -> list[tuple[int, float]]:
    """(first layer, tokens from there on) of a row of the table."""
    every = FRAMES * CELLS
    if row == "Vanilla":
        return [(0, every)]
    if row == "FastV 100%":
        return [(0, every), (2, 0.2 * every)]  # assumption: a fifth behind layer 2, the setting that gives 9.3 T
    method, share = row.rsplit(" ", 1)
    kept = entering(int(share.rstrip("%")))
    return [(0, kept), (LAYER, GOES_ON * kept)] if method == "HoliTom" else [(0, kept)]


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}: TFLOPs, and their share of the unpruned ones, which the
    table divides as printed, with one digit."""
    rows = ["Vanilla", "FastV 100%", "DyCoke 25%"]
    rows += [f"{method} {share}%" for share in (25, 20, 15, 10) for method in (*BEFORE, "HoliTom")]
    spent = {row: prefill_flops(ONEVISION_7B, stages(row)) / 1e12 for row in rows}
    full = round(spent["Vanilla"], 1)
    results = {}
    for row, flops in spent.items():
        results[f"{MAIN}/{row}/prefill FLOPs"] = {"value": round(flops, 3)}
        if row != "Vanilla":
            results[f"{MAIN}/{row}/FLOPs ratio"] = {"value": round(100 * round(flops, 1) / full, 3)}
    return results
