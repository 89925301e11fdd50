"""VLA-Pruner: the temporal guide, the greedy filter and whole selections of the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, ModelInfo, Site
from prunelab.common.core.selection import cosine_distance, descending, max_min_order
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.vla_pruner.method import INPUTS, VLAPruner, combined, filtered, temporal_guide

TOLERANCE = {"out_guide": (1e-6, 1e-2), "": (1e-6, 0.0)}
ROWS = {"prefill": "all", "fastv": "last", "text": "text"}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_features" in inputs:
        features = torch.from_numpy(inputs["in_features"]).unsqueeze(0)
        kept, tokens = int(inputs["in_num_keep"]), features.shape[1]
        if kept >= tokens:  # nothing to filter
            return {"out_selected_in_order": np.arange(tokens)}
        return {"out_selected_in_order": max_min_order(cosine_distance(features), kept)[0].numpy()}
    if "in_history_oldest_first" in inputs:
        history = torch.from_numpy(inputs["in_history_oldest_first"]).unsqueeze(1)
        return {"out_guide": temporal_guide(history, float(inputs["in_gamma"]))[0].numpy()}
    return selection(inputs)


def selection(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One cut, as the method plans it with the guide as its only remembered step."""
    attention, embeds = (torch.from_numpy(inputs[f"in_{name}"]) for name in ("attention", "inputs_embeds"))
    start, tokens, total = int(inputs["in_image_start"]), int(inputs["in_n_image"]), embeds.shape[1]
    kept = round(tokens * (1 - float(inputs["in_prune_ratio_r"])))  # the authors round half to even
    guided = "in_temporal_guide" in inputs
    image = slice(start, start + tokens)
    prunable = torch.zeros(1, total, dtype=torch.bool)
    prunable[:, image] = True
    method = VLAPruner(
        layer=1,
        window=int(guided),
        rounded=False,
        rows=ROWS[str(inputs["in_mode"])],  # type: ignore[arg-type]
    )
    site = Site(1, "input")
    sources = {
        "received": lambda: attention.sum(2),
        "last_row": lambda: attention[:, :, -1],
        Reading("attention", 0, rows="text"): lambda: attention[:, :, start + tokens :],
        INPUTS: lambda: embeds,
    }
    memory: dict[str, list[Tensor]] = {}
    if guided:
        guide = torch.from_numpy(inputs["in_temporal_guide"]).unsqueeze(0)
        memory["history"] = [guide]
    signals = TokenSignals(
        sources, prunable=prunable, units=tokens, info=ModelInfo("golden", 2, 4, embeds.shape[2], total),
        required=method.requires(site), memory=memory,
    )  # fmt: skip
    gather = method.plan(site, signals, Budget(kept, "count")).reduce
    assert isinstance(gather, Gather)
    current = method.relevance(signals)[:, image]
    best = descending(current)[0, :kept]
    found = {
        "out_current_scores": current[0].numpy(),
        "out_num_keep": np.array(kept),
        "out_kept_absolute_sorted": gather.index[0].numpy(),
        "out_position_ids": gather.index.numpy(),
        "out_selected_image_indices_in_selection_order": best.numpy(),
    }
    if guided:
        counts = torch.tensor([[kept]])
        union = combined(current, guide, counts)
        found |= {
            "out_guide_topk": descending(guide)[0, :kept].numpy(),
            "out_current_topk": best.numpy(),
            "out_union": union[0].nonzero().squeeze(1).numpy(),
            "out_selected_image_indices_in_selection_order": filtered(union, embeds[:, image], counts, kept)[0].numpy(),
        }
    return found
