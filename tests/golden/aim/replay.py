"""AIM: merging rounds, the random walk, and the schedule over a decoder's layers, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core import selection
from prunelab.methods.aim.method import importance, merge, retained

TOLERANCE = {"out_importance": (1e-6, 1e-4), "": (1e-5, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if case.startswith("progressive"):
        return schedule(inputs)
    if "in_logits_masked" in inputs:
        given = {
            name: round(float(inputs[f"in_{name}"]), 6) for name in ("tau_imp", "iters", "d") if f"in_{name}" in inputs
        }
        logits = torch.from_numpy(inputs["in_logits_masked"])
        walk = importance(logits, given.get("tau_imp", 0.1), int(given.get("iters", 5)), given.get("d", 0.0))
        return {"out_importance": walk.numpy()}
    if "in_features" in inputs:
        features = torch.from_numpy(inputs["in_features"]).float()
        side = round(features.shape[1] ** 0.5)
        return {"out_tokens": merge(features, 49, (side, side), pool=2).apply(features).numpy()}
    tokens = torch.from_numpy(inputs["in_tokens"])
    if "in_r" in inputs:
        total = tokens.shape[1]
        left = total - min(int(inputs["in_r"]), total // 2)
        return {"out_tokens": merge(tokens, left, (1, total)).apply(tokens).numpy()}
    left, found = tokens.shape[1], {}
    for step in range(1, int(inputs["in_steps"]) + 1):  # the authors' ladder: half of the first count, a quarter, ...
        left -= min(tokens.shape[1] // 2**step, left // 2)
        found[f"out_step{step}"] = selection.merged(tokens, left).apply(tokens).numpy()
    return found


def schedule(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every layer on the full sequence under the mask that the layer before it left, as the release runs it."""
    start, end, total = inputs["in_boundary"].tolist()
    prunable = torch.zeros(1, total, dtype=torch.bool)
    prunable[:, start:end] = True
    running, causal = torch.ones(1, total, dtype=torch.bool), torch.ones(total, total, dtype=torch.bool).tril()
    shares, walks, masks = [], [], []
    for layer, raw in enumerate(torch.from_numpy(inputs["in_logits"]).float()):
        seen = causal & running[:, None, None, :]
        walk = importance(raw.masked_fill(~seen, torch.finfo(torch.float32).min))
        shares.append(retained(layer, 14, 22))
        kept = selection.top_k_units(
            walk, prunable & running, end - start, [int(round(shares[-1] * (end - start), 6))], running
        )
        places = kept.index if kept.valid is None else kept.index.masked_select(kept.valid).view(1, -1)
        running = torch.zeros_like(running).scatter(1, places, True)
        walks.append(walk[0])
        masks.append(running[0])
    return {
        "out_retain_rate": np.array(shares, dtype=np.float32),
        "out_importance": torch.stack(walks).numpy(),
        "out_mask_after_layer": torch.stack(masks).numpy(),
    }
