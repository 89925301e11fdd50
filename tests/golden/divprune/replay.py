"""DivPrune: distances and greedy picks of the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.selection import cosine_distance, max_min_order

TOLERANCE = {"": (1e-6, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    tokens = torch.from_numpy(inputs["in_tokens"]).unsqueeze(0)
    kept = round(round(float(inputs["in_keep_ratio"]), 6) * tokens.shape[1])  # the authors round half to even
    distance = cosine_distance(tokens)
    order = max_min_order(distance, kept)[0]
    return {
        "out_distance": distance[0].numpy(),
        "out_selected_in_order": order.numpy(),
        "out_selected_sorted": order.sort().values.numpy(),
    }
