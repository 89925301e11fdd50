"""Recoverable Compression: shares of outliers, and what becomes of every patch, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.recoverable_compression.method import class_interest, mixture, outlier_share, parted

TOLERANCE = {"": (1e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_k" in inputs:
        return {
            f"out_ratio_{short}": np.float32(
                outlier_share(torch.from_numpy(inputs[f"in_scores_{name}"])[0], int(inputs["in_k"]))
            )
            for short, name in (("heavy", "heavy_tail"), ("uniform", "uniform"))
        }
    query, keys, features = (
        torch.from_numpy(inputs[name]) for name in ("in_q_cls", "in_k_cls_and_patches", "in_patch_features")
    )
    interest = class_interest(query, keys)[0]
    parts = parted(interest, torch.from_numpy(inputs["in_text_patch_similarity"])[0, 0], keys[0, 1:], least=0)
    return {
        "out_ratio_vision": np.float32(parts.shares[0]),
        "out_ratio_text": np.float32(parts.shares[1]),
        "out_ratio_clusters": np.float32(parts.shares[2]),
        "out_index_vision": parts.vision[None].numpy(),
        "out_index_text": parts.text[None].numpy(),
        "out_index_kept_sorted": torch.cat([parts.vision, parts.text]).sort().values[None].numpy(),
        "out_index_other": parts.rest[None].numpy(),
        "out_cluster_center_index_in_other": parts.centres[None].numpy(),
        "out_tokens": mixture(parts, interest).apply(features).numpy(),
    }
