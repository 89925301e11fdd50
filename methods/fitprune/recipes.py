"""The recipes that FitPrune's authors fitted for LLaVA-1.5-7B: how many of 576 image tokens each of 32 layers deletes,
by the percentage of the decoder's FLOPs for visual tokens that is saved."""

from __future__ import annotations

import bisect
from itertools import accumulate

TOKENS = 576
RECIPES: dict[int, tuple[int, ...]] = {
    percent: tuple(map(int, deleted.split()))
    for percent, deleted in {
        0: "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        10: "0 0 1 2 1 0 1 4 5 5 11 4 2 2 0 0 1 1 2 4 2 10 1 1 1 2 1 1 0 1 0 0",
        20: "0 0 3 3 1 1 4 16 14 15 24 4 2 3 2 0 6 0 5 13 4 19 2 1 1 1 1 1 2 1 0 0",
        30: "0 0 7 6 4 5 16 40 24 21 24 4 2 3 4 0 16 0 11 26 6 32 3 1 0 1 2 2 4 0 0 0",
        40: "0 1 21 13 14 11 41 53 29 15 14 5 1 4 5 1 26 1 13 28 6 27 2 1 0 0 1 1 2 0 0 0",
        50: "3 7 49 24 29 17 59 41 26 8 10 6 2 5 7 2 30 3 13 27 5 23 2 1 0 0 1 1 2 0 0 0",
        55: "6 17 69 31 34 19 59 30 23 6 8 7 2 5 8 2 29 4 12 25 4 19 2 1 0 0 1 0 1 0 0 0",
        60: "14 33 89 36 36 20 55 21 18 4 7 5 2 5 7 4 26 5 11 24 4 18 2 1 0 0 1 0 1 0 0 0",
        70: "48 79 118 41 33 17 36 9 9 2 3 2 1 3 4 8 18 7 8 20 4 13 2 1 0 0 1 0 1 0 0 0",
        80: "128 127 118 35 26 8 13 3 2 1 0 0 0 2 1 8 7 8 5 11 2 6 1 1 0 0 0 1 0 0 0 0",
        90: "262 153 80 19 13 1 2 0 0 0 0 0 0 0 0 1 1 2 1 2 0 1 0 0 0 0 0 1 0 0 0 0",
    }.items()
}


def left_of(recipe: tuple[int, ...], tokens: int) -> list[int]:
    """Tokens that each layer sees, and those behind the last: one more than the recipe has layers."""
    return [max(0, n) for n in accumulate(recipe, lambda left, gone: left - gone, initial=tokens)]


def left(saved: float, depth: int, tokens: int) -> list[int]:
    """Tokens that each of `depth` layers sees when that share of the FLOPs is saved, and those behind the last.

    Between the authors' recipes, for other depths and other numbers of tokens, linear in what is left (assumption); all
    that is saved beyond 90 % leaves behind the first layer.
    """
    curves = {p: [n / TOKENS for n in left_of(recipe, TOKENS)] for p, recipe in RECIPES.items()}
    curves[100] = [1.0] + [0.0] * (len(curves[0]) - 1)
    known, percent = sorted(curves), min(max(round(100 * saved, 6), 0), 100)
    upper = max(1, bisect.bisect_left(known, percent))
    low, high = known[upper - 1], known[upper]
    weight = (percent - low) / (high - low)
    curve = [(1 - weight) * a + weight * b for a, b in zip(curves[low], curves[high], strict=True)]
    results = []
    for layer in range(depth + 1):
        place = layer / depth * (len(curve) - 1)
        before = min(int(place), len(curve) - 2)
        share = curve[before] + (place - before) * (curve[before + 1] - curve[before])
        results.append(round(tokens * share))
    return results
