"""The column of FLOPs, relative to the unpruned model, by 4nd^2 + 2n^2d + 2ndm a layer of a decoder of Llama's size."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B, prefill_flops

TABLE = "README performance"
TEXT = 22  # assumption: tokens of text, with which the formula gives every printed figure but OneVision's with PruneVid
VISUAL = {"PLLaVA": 16 * 144, "ST-LLM": 16 * 32, "LLaVA-OneVision": 32 * 196}
FASTV = 2, 0.3  # whole layers, and the share behind them
MERGED = {"PLLaVA": 0.557, "LLaVA-OneVision": 0.552}  # what PruMerge leaves, as printed
LEFT, ALPHA, LAYER = {"PLLaVA": 0.162, "ST-LLM": 0.151}, 0.4, 11  # PruneVid's in the end, its alpha, and from where


def stages(model: str, method: str) -> list[tuple[int, float]]:
    """(first layer, tokens from there on) of a row."""
    shares = [(0, 1.0)]
    if method == "FastV":
        shares += [FASTV]
    elif method == "Prumerge":
        shares = [(0, MERGED[model])]
    elif method == "PruneVid":  # what enters the decoder follows from alpha
        shares = [(0, LEFT[model] / ALPHA), (LAYER, LEFT[model])]
    return [(first, share * VISUAL[model] + TEXT) for first, share in shares]


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}. LOOK-M prunes the cache behind the prefill."""
    results = {}
    for model in VISUAL:
        whole = prefill_flops(LLAVA_7B, stages(model, ""))
        methods = [
            "",
            "FastV",
            "Look-M",
            *(["Prumerge"] if model in MERGED else []),
            *(["PruneVid"] if model in LEFT else []),
        ]
        for method in methods:
            row = f"{model} w/ {method}" if method else model
            results[f"{TABLE}/{row}/FLOPs"] = {
                "value": round(prefill_flops(LLAVA_7B, stages(model, method)) / whole, 4)
            }
    return results
