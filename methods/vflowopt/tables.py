"""FLOPs and caches of the paper's table 5, which says no formula: these are those that give its figures."""

from __future__ import annotations

from prunelab.common.costs.formulas import ONEVISION_7B, prefill_flops

VISUAL, TEXT = 4410, 41  # assumption: MME's means; with the released strategies they give the printed caches
STRATEGIES = {
    "vanilla": (1.0, 1.0, 1.0),
    "50%": (0.7233201448753168, 0.748747637472693, 0.487),
    "75% pruned": (0.2651026358526424, 0.9833433139039235, 0.8773258179532721),
    "90% pruned": (0.11661529508161146, 1.0, 0.6011),
}
LAYERS = (0, 9, 18)  # before the decoder, and behind a third and two thirds of it
BYTES = 2 * ONEVISION_7B.width * 2  # keys and values of every head in 16 bits, though the model has fewer of them


def stages(shares: tuple[float, float, float]) -> list[tuple[int, float]]:
    """(layer, tokens from there on) of a strategy."""
    results, visual = [], float(VISUAL)
    for layer, share in zip(LAYERS, shares, strict=True):
        visual *= share
        results.append((layer, visual + TEXT))
    return results


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    results = {}
    for row, shares in STRATEGIES.items():
        counted = stages(shares)
        ends = (*LAYERS[1:], ONEVISION_7B.layers)
        tokens = sum((end - start) * n for (start, n), end in zip(counted, ends, strict=True))
        results[f"T5 MME/{row}/FLOPs"] = 2 * prefill_flops(ONEVISION_7B, counted, matrices=3) / 1e12
        results[f"T5 MME/{row}/KV cache"] = tokens * BYTES / 1e6
    return {name: {"value": round(value, 4)} for name, value in results.items()}
