"""HiPrune: the kept tokens of one crop, of five, and of Qwen2.5-VL's merged patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core import selection
from prunelab.methods.hiprune.method import importance, ranked

TOLERANCE = {"": (0.0, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    middle, last = (torch.from_numpy(inputs[f"in_attn_{layer}_layer"]) for layer in ("object", "output"))
    if "in_hw" in inputs:
        middle, last, width = middle.unsqueeze(0), last.unsqueeze(0), int(inputs["in_hw"][1])
        keep = round(middle.shape[1] * round(float(inputs["in_retain_ratio"]), 6))
    else:
        middle, last = (importance(attention.mean(1, keepdim=True).mean(2)[..., 1:]) for attention in (middle, last))
        width, keep = 24, int(inputs["in_retention_total"]) // int(inputs["in_batch"])
    scores = ranked(middle, last, keep, round(float(inputs["in_alpha"]), 6), width)
    index, _ = selection.top_k(scores, keep)
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, index, True)
    flat = "in_hw" in inputs
    return {"out_mask": (mask[0] if flat else mask).numpy(), "out_kept_indices": (index[0] if flat else index).numpy()}
