"""FLOPs and caches of table 3: 4nd^2 + 2n^2d + 3ndm a layer for image tokens alone."""

from __future__ import annotations

from collections.abc import Sequence

from prunelab.common.costs.formulas import LLAVA_7B, ONEVISION_7B, Decoder, prefill_flops

K = 6  # the paper's layer for all three models
LEFT = 0.222  # assumption: the table is of the ratio 77.8 %
# assumption: as many image tokens as give the printed FLOPs of the unpruned model; five pictures of 576 are 2880.
# With the decoder and the bytes that a layer holds of a token in 16 bits, in the unit of the table's cache.
MODELS = {
    "LLaVA-Next-7B": (2882, LLAVA_7B, 4 * 32 * 128 / 1e9),
    "InternVL2.5-8B": (3315, Decoder(4096, 14336, 32), 4 * 8 * 128 / 1e6),
    "Qwen2.5VL-7B": (3497, ONEVISION_7B, 4 * 4 * 128 / 1e6),
}


def stages() -> dict[str, list[tuple[int, float]]]:
    """By method, the share of the image tokens that is there from a layer on."""
    left = LEFT
    half = 1 - (1 - left) / 2  # before the decoder; then the examples' images lose the rest, and the question's does
    return {
        "vanilla": [(0, 1.0)],
        "FastV": [(0, 1.0), (2, left)],
        "DivPrune": [(0, left)],
        "CATP": [(0, half), (K + 1, (4 * left + half) / 5), (K + 2, left)],
    }


def held(decoder: Decoder, stages: Sequence[tuple[int, float]], bytes_a_layer: float) -> float:
    """What the decoder's cache holds of so many tokens a layer."""
    ends = [*(start for start, _ in stages[1:]), decoder.layers]
    return sum((end - start) * tokens for (start, tokens), end in zip(stages, ends, strict=True)) * bytes_a_layer


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    results = {}
    for model, (tokens, decoder, size) in MODELS.items():
        for method, shares in stages().items():
            counted = [(layer, tokens * share) for layer, share in shares]
            row = f"T3/{model} {method}"
            results[f"{row}/FLOPs"] = prefill_flops(decoder, counted, matrices=3) / 1e12
            results[f"{row}/KV cache"] = held(decoder, counted, size)
    return {name: {"value": round(value, 4)} for name, value in results.items()}
