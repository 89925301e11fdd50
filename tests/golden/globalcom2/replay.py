"""GlobalCom2: scales of crops, and whole images with all their newlines, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core import selection
from prunelab.methods.globalcom2.method import crop_scales, kept_of_crops, placed, spread, stitched, unstitched

TOLERANCE = {"scales": (1e-6, 0.0), "tokens": (0.0, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    columns, rows = inputs["hp_grid_wh" if "hp_grid_wh" in inputs else "in_grid_wh"].tolist()
    ratio, temperature = float(inputs["hp_retention"]), float(inputs.get("hp_temperature", np.float64(10)))
    if "in_base_cls_score" in inputs:
        thumbnail = torch.from_numpy(inputs["in_base_cls_score"]).unsqueeze(0)
        grid = (round(thumbnail.shape[1] ** 0.5),) * 2
        return {"out_scales": crop_scales(thumbnail, grid, (rows, columns), ratio, temperature)[0].numpy()}
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    features, newline = torch.from_numpy(inputs["in_features"]), torch.from_numpy(inputs["w_newline"])
    scores, (width, height) = torch.from_numpy(inputs["in_cls_score"]).unsqueeze(0), inputs["in_image_size_wh"].tolist()
    grid, mosaic, patches = (int(inputs["hp_side"]),) * 2, (rows, columns), features.shape[1]
    whole = stitched(torch.arange(rows * columns * patches).view(-1, patches), grid, mosaic)
    real = unpad_image(whole.unsqueeze(0), (height, width)).flatten()
    valid = torch.zeros(rows * columns * patches, dtype=torch.bool).index_fill(0, real, True).view(-1, patches)
    assert torch.equal(unstitched(whole, grid, mosaic).flatten(), torch.arange(whole.numel()))
    thumbnail = selection.descending(scores[:, 0])[0, : int(patches * ratio)]
    scales = crop_scales(scores[:, 0], grid, mosaic, ratio, temperature)
    kept = kept_of_crops(scores[:, 1:], spread(scores[:, 0], grid, mosaic, valid), valid, scales)
    order, _, cells = placed(kept, valid, grid, mosaic, "released")
    sequence, wide = [], columns * grid[1]
    for row in range(rows * grid[0]):  # the release has a newline behind rows without a token, too
        sequence += [features[1:].flatten(0, 1)[order[0][cells[0] // wide == row]], newline.unsqueeze(0)]
    return {
        "out_scales": scales[0].numpy(),
        "out_thumbnail_index": thumbnail.numpy(),
        "out_image_tokens": torch.cat([features[0][thumbnail], *sequence]).float().numpy(),
    }
