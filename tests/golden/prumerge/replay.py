"""LLaVA-PruMerge and PruMerge+: attention of the class token, how many patches stay, which, and what they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.prumerge.method import (
    PruMerge,
    best,
    class_attention,
    merged,
    others,
    outlier_share,
    spatial_fixed,
)

TOLERANCE = {"(index|complement)": (0.0, 0.0), "": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    query, keys, hidden = (torch.from_numpy(inputs[name]) for name in ("in_query_cls", "in_key", "in_hidden"))
    scores = class_attention(query, keys)
    adaptive, plus = bool(inputs["hp_adaptive"]), case.startswith("prumergeplus")
    share = outlier_share(scores) if adaptive else float(inputs["hp_reduction_ratio"])
    if adaptive:
        kept = PruMerge(plus=plus).kept(scores, scores.shape[1])
    else:
        kept = best(scores, share)
        even = spatial_fixed(scores.shape[1], share) if plus else kept.new_zeros(0)
        kept = torch.cat([kept, even.expand(len(kept), -1)], 1)
    tokens = merged(scores, keys[:, 1:], kept).apply(hidden[:, 1:])
    out = {
        "out_cls_attention": scores,
        "out_index": kept,
        "out_complement": others(kept, scores.shape[1]),
        "out_tokens": tokens,
    }
    return {"out_ratio_used": np.array(share), **{name: value.numpy() for name, value in out.items()}}
