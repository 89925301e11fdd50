"""The FLOPs that the paper counts: 4nd^2 + 2n^2d + 3ndm a layer of the decoder, for visual tokens alone."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B, Decoder, prefill_flops
from prunelab.methods.pyramiddrop.method import stages

NEXT = 2880  # tokens of LLaVA-NeXT's five crops, newlines apart (assumption: of an image that fills them)


def flops(visual: float, share: float = 0.5, number: int = 4, decoder: Decoder = LLAVA_7B) -> float:
    """TFLOPs of a prefill of so many visual tokens, of which each stage leaves that share: 1.78 of LLaVA-1.5's 576."""
    left = [(layer, visual * share**i) for i, layer in enumerate((0, *stages(decoder.layers, number)))]
    return prefill_flops(decoder, left, matrices=3) / 1e12


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    saved = 100 * (1 - flops(NEXT) / flops(NEXT, 1.0))
    return {"headline/LLaVA-NeXT PyramidDrop/inference FLOPs reduction": {"value": round(saved, 3)}}
