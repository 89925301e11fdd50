"""A2SF: the eviction masks of the paper's time, token by token, and the later version's scores and choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core import attention
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.kv_cache.role import CacheSignals
from prunelab.methods.a2sf.method import A2SFPrefill, Reading

TOLERANCE = {"": (1e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    return masks(inputs) if "in_attn_logits" in inputs else prefill(inputs)


def masks(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    logits = torch.from_numpy(inputs["in_attn_logits"])
    batch, heads, total, _ = logits.shape
    sink, selecting, recent = (int(inputs[f"in_{part}_budget"]) for part in ("streaming", "selecting", "recent"))
    places = torch.arange(total).expand(batch, heads, -1)
    capacity = torch.full((batch, 1, 1), sink + selecting + recent)
    forgetting = round(float(inputs["in_forgetting_factor"]), 6)
    text = Reading(torch.zeros(places.shape, dtype=torch.bool), places, capacity, sink, recent, forgetting)
    rows = []
    for n in range(total):
        rows.append(~text.evicted)
        text.take(logits[:, :, n, None, : n + 1].softmax(-1))
    mask = torch.stack(rows, 2)  # [B, H, L, L], what was left before each row
    return {
        "out_mask": np.packbits(mask.numpy()),
        "out_mask_shape": np.array(mask.shape),
        "out_kept_per_row": mask.tril().sum(-1).numpy(),
    }


def prefill(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    queries, keys, values = (torch.from_numpy(inputs[f"in_{part}"]) for part in "qkv")
    total, recent = int(inputs["in_total_budget"]), int(inputs["in_recent_budget"])
    observers = int(inputs["in_observation_window"]) if "in_observation_window" in inputs else None
    forgetting = round(float(inputs.get("in_forgetting_factor", 1.0)), 6)
    method = A2SFPrefill(forgetting, recent, observers)
    length = keys.shape[2]
    signals = CacheSignals(
        {"queries": lambda: queries, "keys": lambda: keys},
        scale=keys.shape[-1] ** -0.5,
        indices=torch.arange(length).expand(keys.shape[:3]),
        prompt=(length,) * len(keys),
        seen=length,
        marks={},
        prefill=True,
        info=ModelInfo("golden", 1, queries.shape[1], queries.shape[1] * queries.shape[3], length),
    )
    kept = method.plan(Site(0), signals, Budget(total, "count")).reduce.index  # type: ignore[union-attr]
    rows = attention.causal_rows(queries, keys, signals.scale)  # [B, KV, G, L, L]
    return {
        "out_scores": method.score(Site(0), signals).numpy(),
        "out_attn": (rows @ values.unsqueeze(2)).flatten(1, 2).numpy(),
        "out_selected": (kept if kept.shape[-1] < length else kept.new_empty(0)).numpy(),
    }
