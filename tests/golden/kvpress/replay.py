"""KVPress: its observed attention and SnapKV beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from prunelab.common.core.attention import grouped
from prunelab.common.core.plan import take
from prunelab.methods.h2o.method import per_observer
from prunelab.methods.snapkv.method import votes

TOLERANCE = {"": (1e-6, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    attention, keys, values = (torch.from_numpy(inputs[f"in_{part}"]) for part in ("attn", "k", "v"))
    rows = grouped(attention, keys.shape[1])  # [B, KV, G, L, L]
    total = keys.shape[2]
    if "in_window_size" in inputs:
        window = int(inputs["in_window_size"])
        scores = votes(rows[:, :, :, -window:], int(inputs["in_kernel_size"]))
        scores = F.pad(scores, (0, window), value=float(scores.max()) + 1)
    else:
        scores = per_observer(rows.sum((2, 3)), torch.arange(total).expand(keys.shape[:3]), rows.shape[2])
    kept = int(round(total * (1 - round(float(inputs["in_compression_ratio"]), 6)), 6))
    index = scores.topk(kept, dim=-1).indices  # in the peer's order, where ours is that of the text
    return {
        "out_scores": scores.numpy(),
        "out_indices": index.numpy(),
        "out_k": take(keys, index).numpy(),
        "out_v": take(values, index).numpy(),
    }
