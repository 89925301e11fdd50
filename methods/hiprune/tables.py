"""The FLOPs of the paper's table 5, as calflops counts them."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B

VOCABULARY = 32000
TEXT = 77.3  # assumption: text tokens of a prompt in the mean; 77.2 to 77.4 give all four printed figures
KEPT = {"vanilla": 576, "HiPrune 192": 192, "HiPrune 128": 128, "HiPrune 64": 64}


def flops(visual: int, text: float = TEXT) -> float:
    """Operations of a prefill in T: two for every weight of the decoder's linear layers (four projections of attention
    and three matrices of the MLP) and of its output layer, for every token. Products of attention are not counted."""
    d, m = LLAVA_7B.width, LLAVA_7B.inner
    weights = LLAVA_7B.layers * (4 * d**2 + 3 * d * m) + VOCABULARY * d
    return 2 * weights * (visual + text) / 1e12


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    return {f"T5 LLaVA-1.5-7B/{row}/FLOPs": {"value": round(flops(kept), 4)} for row, kept in KEPT.items()}
