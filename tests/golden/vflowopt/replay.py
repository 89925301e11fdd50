"""VFlowOpt: importance with entropy, recycling, and the stages within the decoder, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.vflowopt.method import calibrated, dropped, merged, patch_entropy, recycled

TOLERANCE = {"entropy": (1e-4, 1e-4), "": (1e-6, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_attention" in inputs:
        weights = torch.from_numpy(inputs["in_attention"])
        batch, heads, total, _ = weights.shape
        scores, trust = calibrated(lambda a, b: weights[:, :, a:b], (batch, heads, total), float(inputs["in_t"]))
        side = round(total**0.5)
        pixels = (torch.from_numpy(inputs["in_pixels_uint8"]).float() + 0.5) / 255
        bits = patch_entropy(pixels, (side, side))
        return {
            "out_entropy_bits": bits.numpy(),
            "out_importance": (scores + float(inputs["in_alpha"]) * bits.softmax(-1)).numpy(),
            "out_num_trusted_tokens": trust.sum(1).numpy(),
        }
    importance = torch.from_numpy(inputs["in_importance"])
    if "in_features" in inputs:
        features, side = torch.from_numpy(inputs["in_features"]), int(inputs["in_base_side"])
        cell, ratio = float(inputs["in_cell_size_a"]), float(inputs["in_keep_ratio"])
        width = int(inputs["in_local_w_with_newline"])
        stays, low, stands, weight = recycled(importance, side**2, side, width, cell, ratio)
        kept, (cells, tokens) = features[stays], merged(features, low, stands, weight)
        kept[stays.cumsum(0)[cells] - 1] = tokens
        return {
            "out_num_merged_budget": np.array(int(len(importance) / cell**2)),
            "out_keep_mask": stays.numpy(),
            "out_features": kept.numpy(),
            "out_importance_kept": importance[stays].numpy(),
        }
    start, total, found = int(inputs["in_image_start"]), int(inputs["in_seq_len"]), {}
    for stage, ratio in enumerate(inputs["in_keep_ratios"].tolist()):
        gone = importance.argsort()[: dropped(len(importance), ratio)]
        stays = torch.ones(total, dtype=torch.bool).index_fill(0, gone + start, False)
        found[f"out_keep_mask_stage{stage}"] = stays.numpy()
        importance = importance[stays[start : start + len(importance)]]
        total = int(stays.sum())
    return found
