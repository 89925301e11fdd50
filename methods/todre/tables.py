"""FLOPs of table 4: two operations for each of the supplement's 4nd^2 + 2n^2d + 2ndm multiply-adds a layer."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B, prefill_flops

VISUAL, TEXT = 2392, 339  # assumption: no lengths are printed; these give the unpruned model's figure and DivPrune's
SHARE = 0.1


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    full, left, depth = VISUAL + TEXT, SHARE * VISUAL + TEXT, LLAVA_7B.layers
    before: list[tuple[int, float]] = [(0, left)]
    stages: dict[str, list[tuple[int, float]]] = {
        "LLaVA-NeXT-7B": [(0, full)],
        "FastV 10%": [(0, full), (2, left)],
        "SparseVLM 10%": before,  # a tenth in the mean over layers
        "FasterVLM 10%": before,
        "GlobalCom2 10%": before,
        "DivPrune 10%": before,
        "ToDRE 10%": [(0, left), (7 * depth // 8, TEXT)],  # the rest leaves there
    }
    return {f"T4/{row}/FLOPs": {"value": round(2 * prefill_flops(LLAVA_7B, x) / 1e12, 4)} for row, x in stages.items()}
