"""SpecKV's compression, SpecPC's scores and choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core import attention
from prunelab.common.core.plan import take
from prunelab.methods.spec_kv.method import asked_for, attended, chosen, smooth

TOLERANCE = {"": (1e-6, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_q" in inputs:
        return compression(inputs)
    return choice(inputs) if "in_scores" in inputs else scores(inputs)


def compression(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    queries, keys, values = (torch.from_numpy(inputs[f"in_{part}"]) for part in "qkv")
    window, capacity = int(inputs["in_window_size"]), int(inputs["in_max_capacity"])
    rows = attention.causal_rows(queries[:, :, -window:], keys, keys.shape[-1] ** -0.5)
    found = asked_for(
        rows,
        int(inputs["in_kernel_size"]),
        str(inputs["in_reduction"]),  # type: ignore[arg-type]
        str(inputs["in_pool"]),  # type: ignore[arg-type]
    )
    total, kept = keys.shape[2], max(capacity - window, 0)
    order = found.topk(min(max(kept, int(inputs["in_prefill_vertical_size"])), total - window), -1).indices
    last = torch.arange(total - window, total).expand(*order.shape[:2], -1)
    cache = torch.cat([order[..., :kept], last], -1) if capacity >= 0 else torch.arange(total).expand(keys.shape[:3])
    return {"out_indices": order.numpy(), "out_k": take(keys, cache).numpy(), "out_v": take(values, cache).numpy()}


def choice(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = smooth(torch.from_numpy(inputs["in_scores"]), int(inputs["in_kernel_size"]), str(inputs["in_pool"]))  # type: ignore[arg-type]
    sizes = [int(inputs[f"in_{part}"]) for part in ("max_capacity", "window_size", "neighbor_tokens")]
    return {"out_indices": chosen(values[0], *sizes).unsqueeze(0).numpy()}


def scores(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    window, first = int(inputs["in_window_size"]), int(inputs["in_starting_layer"])
    layers = sum(name.startswith("in_q_l") for name in inputs)
    rows = []
    for i in range(layers):
        queries, keys = (torch.from_numpy(inputs[f"in_{part}_l{i}"]) for part in "qk")
        found = attention.causal_rows(queries[:, :, -window:], keys, keys.shape[-1] ** -0.5)
        rows.append(found.flatten(1, 2))
    steps = len({name.split("_")[3] for name in inputs if name.startswith("in_decode_attn")})
    later = [
        [torch.from_numpy(inputs[f"in_decode_attn_s{s}_l{i}"]) for i in range(first, layers)] for s in range(steps)
    ]
    weighted, reduction = bool(inputs["in_weighted_query"]), str(inputs["in_reduction"])
    return {
        "out_scores": attended(rows[first:], later, weighted, reduction).numpy(),  # type: ignore[arg-type]
        **{f"out_window_attn_l{i}": row.numpy() for i, row in enumerate(rows)},
    }
