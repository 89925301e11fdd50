"""What eleven pruned layers of BERT-base leave, from shapes alone."""

from __future__ import annotations

WIDTH, HEAD, INNER, LAYERS = 768, 64, 3072, 12


def left(pruned: int = 11, expander: int = HEAD // 2) -> float:
    """Percent of the multiply-accumulates of all linears when so many layers keep one head and so many neurons."""
    dense = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER
    small = 4 * WIDTH * HEAD + 2 * WIDTH * expander
    return 100 * (pruned * small + (LAYERS - pruned) * dense) / (LAYERS * dense)


def costs() -> dict[str, dict[str, float]]:
    """The headline's FLOPs. Attention's products with keys and values are not in it; at 128 tokens they add 0.1."""
    return {"headline/11 of 12 layers pruned/FLOPs left": {"value": round(left(), 3)}}
