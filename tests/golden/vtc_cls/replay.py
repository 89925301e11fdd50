"""VTC-CLS: scores over the last layers, kept patches, and their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core import selection
from prunelab.common.core.plan import take
from prunelab.methods.vtc_cls.method import ensembled_attention

TOLERANCE = {"score": (1e-6, 0.0), "": (0.0, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    rows = torch.from_numpy(inputs["in_cls_attn_all_layers"]).unsqueeze(1)  # [layers, 1, H, N]
    scores = ensembled_attention(rows[int(inputs["in_start_layer"]) : -1])
    index, _ = selection.top_k(scores, int(inputs["in_keep"]))
    return {
        "out_score": scores[0].numpy(),
        "out_kept_indices_sorted": index[0].numpy(),
        "out_features": take(torch.from_numpy(inputs["in_features_layer_m2"]), index).numpy(),
    }
