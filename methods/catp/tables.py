"""The FLOPs of the unpruned models: 4nd^2 + 2n^2d + 3ndm a layer for image tokens alone, of five pictures a prompt."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B, prefill_flops

PICTURES, TOKENS = 5, 576  # four examples and the question, without crops


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    flops = prefill_flops(LLAVA_7B, [(0, PICTURES * TOKENS)], matrices=3) / 1e12
    return {"T3/LLaVA-Next-7B vanilla/FLOPs": {"value": round(flops, 4)}}
