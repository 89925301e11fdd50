"""FasterVLM: scores, kept patches, and the order in which a large image's crops reach the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.plan import take
from prunelab.common.core.selection import top_k_of_parts
from prunelab.methods.fastervlm.method import class_attention

TOLERANCE = {"score": (1e-6, 0.0), "": (0.0, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_features" in inputs:
        return {"out_visual_embeds": anyres(inputs)}
    scores = class_attention(torch.from_numpy(inputs["in_cls_attn_rows"])[..., 1:])
    index = top_k_of_parts(scores, 1, int(inputs["in_keep"]))
    return {
        "out_cls_score": scores.numpy(),
        "out_index_mask": torch.zeros(scores.shape, dtype=torch.bool).scatter(1, index, True).numpy(),
        "out_kept_indices": index.numpy(),
        "out_kept_features": take(torch.from_numpy(inputs["in_features_layer_m2"])[:, 1:], index).numpy(),
    }


def anyres(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The thumbnail's tokens, then those of the stitched crops in raster order across crops."""
    features = torch.from_numpy(inputs["in_features"])
    crops, patches, _ = features.shape
    side, (width, height) = int(inputs["in_side"]), inputs["in_grid_wh"].tolist()
    scores = class_attention(torch.from_numpy(inputs["in_cls_attn"])).view(1, -1)
    index = top_k_of_parts(scores, crops, int(inputs["in_keep_per_crop"]))
    kept = torch.zeros(1, crops * patches, dtype=torch.bool).scatter(1, index, True).view(crops, patches)

    def stitched(x: torch.Tensor) -> torch.Tensor:
        return x[1:].unflatten(1, (side, side)).unflatten(0, (height, width)).transpose(1, 2).flatten(0, 3)

    return torch.cat([features[0][kept[0]], stitched(features)[stitched(kept)]]).numpy()
