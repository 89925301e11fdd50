"""The FLOPs of the paper's table 2, of visual tokens alone."""

from __future__ import annotations

from prunelab.common.costs.formulas import LLAVA_7B, LLAVA_13B, Decoder, prefill_flops

VISUAL = 576
MODELS = {"LLaVA-1.5-7B": LLAVA_7B, "LLaVA-1.5-13B": LLAVA_13B}
TWELVE = 0.12  # of YOPO's second variant, by its name: which heads, neurons and layers make it is not said
MIXTURES = {  # decoders in every second layer of which a token runs through two MLPs
    "StableLM MoE-LLaVA-1.6Bx4": Decoder(2048, 5632, 24),
    "Phi MoE-LLaVA-2.7Bx4": Decoder(2560, 10240, 32),
}
OTHERS = ("PruMerge+", "PyramidDrop", "SparseVLM", "FastV")  # set to the FLOPs of the first variant


def dense(decoder: Decoder) -> float:
    """TFLOPs of a prefill of an image's tokens: two for each of 4nd^2 + 2n^2d + 3ndm multiply-adds a layer."""
    return 2 * prefill_flops(decoder, [(0, VISUAL)], matrices=3) / 1e12


def work(decoder: Decoder, heads: float, neurons: float, layers: int) -> float:
    """Share of a visual token's multiply-adds that are left where so large a share of heads and of neurons is used, up
    to a layer behind which nothing reads what becomes of visual tokens; attention's products are not counted."""
    attention, mlp = 4 * decoder.width**2, 3 * decoder.width * decoder.inner
    return layers / decoder.layers * (heads * attention + neurons * mlp) / (attention + mlp)


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}."""
    results: dict[str, float] = {}
    for model, decoder in MODELS.items():
        half = work(decoder, 0.5, 0.5, decoder.layers // 2)  # assumption: half of each makes the quarter
        shares = {"Original": 1.0, "YOPO 25%": half, "YOPO 12%": TWELVE, **dict.fromkeys(OTHERS, half)}
        results |= {f"T2/{model} {row}/FLOPs": round(share * dense(decoder), 4) for row, share in shares.items()}
        results["headline/LLaVA-1.5-7B/13B pruned zp25/visual FLOPs left"] = round(100 * half, 3)
        eighth = work(decoder, 0.25, 0.25, decoder.layers // 2)  # assumption
        results["headline/LLaVA-1.5-7B/13B pruned zp12/visual FLOPs left"] = round(100 * eighth, 3)
    for model, decoder in MIXTURES.items():
        second = decoder.layers / 2 * 6 * VISUAL * decoder.width * decoder.inner / 1e12
        results[f"T2/{model}/FLOPs"] = round(dense(decoder) + second, 4)
    return {name: {"value": value} for name, value in results.items()}
