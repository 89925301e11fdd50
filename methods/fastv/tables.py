"""The cost columns of the paper, by its own formula."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B, LLAVA_13B, Decoder, prefill_flops

IMAGE = 576  # image tokens of LLaVA-1.5
SYSTEM = 35  # assumption: the text counted is the system prompt before the image; it gives the printed 55, 33 and 20 %
VIDEO, VIDEO_TEXT = 2048, 68  # Video-LLaVA: eight frames of 256; assumption: text that gives the printed 52.3 %


def relative(decoder: Decoder, layer: int, removed: float, image: int = IMAGE, text: int = SYSTEM) -> float:
    """Percent of the unpruned prefill that is left when `removed` of the image tokens go before a layer."""
    full, kept = image + text, image * (1 - removed) + text
    return 100 * prefill_flops(decoder, [(0, full), (layer, kept)]) / prefill_flops(decoder, [(0, full)])


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    share = "relative FLOPs"
    results = {
        f"T1/LLaVA-1.5-7B baseline/{share}": 100.0,
        f"lmms-eval/FastV K=3 R=50%/{share}": relative(LLAVA_7B, 3, 0.5),
        f"T6/Video-LLaVA+FastV K=2 R=50%/{share}": relative(LLAVA_7B, 2, 0.5, VIDEO, VIDEO_TEXT),
        "headline/LLaVA-1.5-13B/FLOPs reduction": 100 - relative(LLAVA_13B, 2, 0.5),
    }
    for removed in (50, 75, 90):
        results[f"T1/LLaVA-1.5-7B K=2 R={removed}%/{share}"] = relative(LLAVA_7B, 2, removed / 100)
    return {name: {"value": round(value, 3)} for name, value in results.items()}
