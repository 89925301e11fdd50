"""The FLOPs columns of tables 1 and 2, by the paper's formula and over its own tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunelab.common.costs.formulas import LLAVA_7B, LLAVA_13B, Decoder, prefill_flops
from prunelab.methods.fitprune.recipes import left

# Mean text lengths of the tasks, as the released script lists them: COCO, Flickr, GQA, MMBench, MME, MMMU, NoCaps,
# OK-VQA, POPE, ScienceQA, SEED; then ActivityNet, SEED, VideoChatGPT, NextQA, EgoSchema.
IMAGE_TEXT = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
VIDEO_TEXT = (28, 63, 21, 38, 196)
LARGE_IMAGE = (2225, 1922, 2239, 1927, 2108, 1882, 2292, 2249, 2250, 1598, 2116)  # visual tokens of LLaVA-1.6, by task


@dataclass(frozen=True)
class Setting:
    """One block of a table: its decoder, text and visual tokens of every task, and what each method keeps.

    rho: share that DivPrune keeps. withdrawn: the layer before which VTW drops all visual tokens. fastv: FastV's layer
    and the share it keeps behind it. assumption: the last two are in no text we could read; they are the only ones,
    layer by layer and in steps of 0.05 %, that give both printed digits.
    """

    decoder: Decoder
    text: tuple[int, ...]
    visual: tuple[int, ...]
    rho: float
    withdrawn: int
    fastv: tuple[int, float]


SETTINGS = {
    "T1 LLaVA-1.5-7B": Setting(LLAVA_7B, IMAGE_TEXT, (576,) * 11, 0.098, 4, (3, 0.001)),
    "T1 LLaVA-1.5-13B": Setting(LLAVA_13B, IMAGE_TEXT, (576,) * 11, 0.098, 4, (3, 0.022)),
    "T1 LLaVA-1.6-7B": Setting(LLAVA_7B, IMAGE_TEXT, LARGE_IMAGE, 0.098, 3, (3, 0.001)),
    "T2 LLaVA-NeXT-Video-7B": Setting(LLAVA_7B, VIDEO_TEXT, (1152,) * 5, 0.1, 4, (1, 0.07)),
}


def kept(visual: int, share: float) -> int:
    """Visual tokens left, as the released script counts them: the removed ones are rounded."""
    return visual - round((1 - share) * visual)


def costs() -> dict[str, dict[str, float]]:
    """`table/row/column` as in reported.csv -> {"value": ...}: the mean over tasks in T, and the mean of the tasks'
    ratios in percent."""
    results = {}
    for table, s in SETTINGS.items():
        layer, share = s.fastv
        rows: dict[str, Callable[[int], list[tuple[int, int]]]] = {
            "Original": lambda visual: [(0, visual)],
            "VTW": lambda visual, s=s: [(0, visual), (s.withdrawn, 0)],  # type: ignore[misc]
            "FastV": lambda visual, layer=layer, share=share: [(0, visual), (layer, kept(visual, share))],  # type: ignore[misc]
            "DivPrune": lambda visual, s=s: [(0, kept(visual, s.rho))],  # type: ignore[misc]
        }
        for row, stages in rows.items():
            spent, ratios = [], []
            for text, visual in zip(s.text, s.visual, strict=True):
                spent.append(prefill_flops(s.decoder, [(at, text + n) for at, n in stages(visual)]))
                ratios.append(spent[-1] / prefill_flops(s.decoder, [(0, text + visual)]))
            results[f"{table}/{row}/FLOPs"] = {"value": round(sum(spent) / len(spent) / 1e12, 4)}
            results[f"{table}/{row}/FLOPs ratio"] = {"value": round(100 * sum(ratios) / len(ratios), 3)}
    passed = list(enumerate(left(0.9, LLAVA_7B.layers, 576)[1:]))  # a layer pays for what it leaves
    spent = [prefill_flops(LLAVA_7B, [(layer, text + n) for layer, n in passed]) for text in IMAGE_TEXT]
    results["T1 LLaVA-1.5-7B/FitPrune/FLOPs"] = {"value": round(sum(spent) / len(spent) / 1e12, 4)}
    return results
