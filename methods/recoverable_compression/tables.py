"""The cost columns: LLM-Viewer's count and roofline, as AIM's tables have it, of 60 tokens of text and a tenth of 576
visual ones; in fewer bits an operation counts less."""

from __future__ import annotations

from prunelab.methods.aim.tables import VICUNA_7B, prefill

TEXT, IMAGE, KEPT = 60, 576, 57  # assumption: the text, since it alone gives the unpruned model's two printed figures


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    results = {}
    kinds = {"LLaVA1.5 FP16": (IMAGE, 16), "Ours FP16": (KEPT, 16), "Ours INT8": (KEPT, 8), "Ours INT4": (KEPT, 4)}
    for row, (visual, bits) in kinds.items():
        operations, milliseconds = prefill([visual + TEXT] * VICUNA_7B.layers, VICUNA_7B)
        results[f"cost/{row}/FLOPs"] = {"value": round(operations * bits / 16, 4)}
        if bits == 16:
            results[f"cost/{row}/prefill"] = {"value": round(milliseconds, 4)}
    return results
