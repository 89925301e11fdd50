"""The FLOPs of FastV's formula, 4nd^2 + 2n^2d + 3ndm a layer, for OpenVLA's prompt: its image and a line of text."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B, prefill_flops
from prunelab.methods.vla_pruner.method import VLAPruner

IMAGE = 256
TEXT = 35  # assumption: the start token and an instruction; it comes nearest to the unpruned figure
SHARES = {"keep50": 0.5, "keep25": 0.25, "keep12.5": 0.125}


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...} in T; OpenVLA's decoder is LLaVA-7B's."""
    stages = {"Vanilla": [(0, IMAGE + TEXT)]}
    for name, share in SHARES.items():
        stages[f"VLA-Pruner {name}"] = [(0, IMAGE + TEXT), (VLAPruner().layer, int(IMAGE * share) + TEXT)]
    return {
        f"LIBERO OpenVLA/{row}/FLOPs": {"value": round(prefill_flops(LLAVA_7B, layers, matrices=3) / 1e12, 4)}
        for row, layers in stages.items()
    }
