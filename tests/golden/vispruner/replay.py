"""VisPruner: which patches stay of every crop, and how crops are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.tokens.adapters.vlm_prompt import in_packed_order
from prunelab.methods.visionzip.method import raster
from prunelab.methods.vispruner.method import importance, selected

TOLERANCE = {"": (0.0, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    features = torch.from_numpy(inputs["in_features"]).float()
    scores = importance(torch.from_numpy(inputs["in_cls_attention"]))
    index = selected(scores, features, int(inputs["hp_tokens"]), float(inputs["hp_important_ratio"]))
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, index, True)
    out = {"out_mask": mask, "out_index_sorted": index, "out_kept_count": mask.sum(1)}
    if "in_grid_wh" in inputs:
        crops, patches = scores.shape
        columns, rows = inputs["in_grid_wh"].tolist()
        side = round(patches**0.5)
        order = torch.cat([torch.arange(patches), patches + raster((side, side), (rows, columns)).flatten().argsort()])
        turn, _ = in_packed_order(mask.flatten().nonzero().squeeze(1), order, crops * patches, False)
        image = features.flatten(0, 1)[mask.flatten()][turn]
        ids = torch.from_numpy(inputs["in_input_ids"])[0]
        place, words = int((ids == -200).nonzero()), torch.from_numpy(inputs["w_embed"])
        whole = torch.cat([words[ids[:place]], image, words[ids[place + 1 :]]]).unsqueeze(0)
        out |= {"out_image_tokens": image, "out_inputs_embeds": whole}
    return {name: value.numpy() for name, value in out.items()}
