"""The FLOPs that the paper counts: 4nd^2 + 2n^2d + 3ndm a layer of the decoder, for visual tokens alone."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B, prefill_flops
from prunelab.methods.transprune.method import TransPrune

IMAGES = {"T1 LLaVA-1.5-7B": 576, "T2 LLaVA-NeXT-7B": 2880}
HIGH = (0.875, 0.625, 0.125)
LOW = (0.625, 0.1875, 0.0625)  # assumption: of all shares in sixteenths these alone give both printed figures


def flops(stages: list[tuple[int, float]]) -> float:
    """TFLOPs of a prefill of LLaVA-7B: `stages` are (first layer, visual tokens from there on)."""
    return prefill_flops(LLAVA_7B, stages, matrices=3) / 1e12


def stages(visual: int, shares: tuple[float, ...] = HIGH) -> list[tuple[int, float]]:
    """The stages of TransPrune-High, the released shares, which give both printed figures, or those of other shares."""
    left = zip(TransPrune().layers, shares, strict=True)
    return [(0, visual), *((layer, int(visual * share)) for layer, share in left)]


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    results = {}
    for table, visual in IMAGES.items():
        results[f"{table}/{table.partition(' ')[2]}/TFLOPs"] = flops([(0, visual)])
        results[f"{table}/TransPrune-High/TFLOPs"] = flops(stages(visual))
        results[f"{table}/TransPrune-Low/TFLOPs"] = flops(stages(visual, LOW))
    visual = IMAGES["T1 LLaVA-1.5-7B"]
    results["T1 LLaVA-1.5-7B/FastV K=2 R=0.5/TFLOPs"] = flops([(0, visual), (2, visual / 2)])
    results["T1 LLaVA-1.5-7B/PDrop/TFLOPs"] = flops([(8 * i, visual / 2**i) for i in range(4)])
    return {name: {"value": round(value, 4)} for name, value in results.items()}
