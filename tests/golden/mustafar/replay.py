"""Mustafar: per-token and per-channel magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.mustafar.method import largest, output_aware, per_channel, per_token

TOLERANCE = {"_sum": (1e-4, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    def sparsity(name: str) -> float:
        return round(float(inputs[f"in_{name}_sparsity"]), 6)

    if "in_attention" in inputs:
        value, attention = torch.from_numpy(inputs["in_value"]), torch.from_numpy(inputs["in_attention"])
        received = attention.unflatten(1, (value.shape[1], -1)).sum((2, 3))
        return {"out_value": output_aware(value, received, sparsity("v")).numpy()}
    if "in_group_size" in inputs:
        pruned = per_channel(torch.from_numpy(inputs["in_value"]), sparsity("v"), int(inputs["in_group_size"]))
        return {"out_value": pruned.numpy()}
    found: dict[str, np.ndarray] = {}
    for name in ("key", "value"):
        x = torch.from_numpy(inputs[f"in_{name}"])
        kept = largest(x, sparsity(name[0]))
        found[f"out_{name}_mask"] = np.packbits(kept.numpy())
        found[f"out_{name}_sum"] = per_token(x, sparsity(name[0])).sum(-1).numpy()
        found[f"out_{name}_kept_per_vector"] = kept.sum(-1).unique().squeeze().numpy()
    return found
