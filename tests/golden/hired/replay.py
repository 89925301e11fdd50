"""HiRED: class attention, budgets of crops, what is kept of them, and how it is packed, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core import attention
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo
from prunelab.common.tokens.adapters.vlm_prompt import in_packed_order
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.hired.method import HiRED, crop_budgets, importance, regions, split

TOLERANCE = {"attn": (1e-6, 1e-5), "": (0.0, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_q_proj" in inputs:
        heads = int(inputs["hp_heads"])
        q, k = (torch.from_numpy(inputs[f"in_{n}_proj"]).unflatten(2, (heads, -1)).transpose(1, 2) for n in ("q", "k"))
        return {"out_attn_cls_row": attention.row(q, k, q.shape[-1] ** -0.5, 0).numpy()}
    late = torch.from_numpy(inputs["in_attn_layer22_cls"])[..., 1:]
    if "in_num_crops" not in inputs:
        rows = {"late": late, "early": late}
        total = int(late.shape[2] * float(inputs["hp_rate"]))
        kept = chosen(HiRED(), rows, 1, total, None)
        mask = torch.zeros(late.shape[2], dtype=torch.bool).index_fill(0, kept, True)
        return {"out_mask": mask.numpy(), "out_index": kept.numpy()}
    return next_images(inputs, late)


def chosen(method: HiRED, rows: Mapping[str, Tensor], crops: int, total: int, mosaic: tuple[int, int] | None) -> Tensor:
    """Patches [K] kept of one image, for rows [crops, H, N] of its crops."""
    patches = rows["late"].shape[2]
    sources = {
        reading: lambda name=name: rows[name].transpose(0, 1).flatten(1).unsqueeze(0)
        for name, reading in zip(("early", "late"), method.readings(), strict=True)
    }
    signals = TokenSignals(
        sources,
        prunable=torch.ones(1, crops * patches, dtype=torch.bool),
        units=crops * patches,
        info=ModelInfo("golden", 1, 1, 1, 1),
        grids=((round(patches**0.5),) * 2,) * crops,
        mosaic=mosaic,
    )
    if mosaic is not None:  # also where the budget is everything, which a plan keeps whole
        early, scores = (importance(signals.at(reading)) for reading in method.readings())
        return method.of_crops(early, scores, signals, total).index[0]
    return method.plan(method.sites(signals.info)[0], signals, Budget(total, "count")).reduce.index[0]  # type: ignore[union-attr]


def next_images(inputs: Mapping[str, np.ndarray], late: Tensor) -> dict[str, np.ndarray]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    early, features = (torch.from_numpy(inputs[name]) for name in ("in_attn_layer0_cls", "in_features"))
    early, counts = early[..., 1:], inputs["in_num_crops"].tolist()
    rate, method = float(inputs["hp_rate"]), HiRED(float(inputs["hp_alpha"]), newlines=False)
    masks, budgets, packed, first = [], [], [], 0
    for crops, size in zip(counts, inputs["in_image_sizes_hw"].tolist(), strict=True):
        part, first = slice(first, first + crops), first + crops
        mosaic = get_anyres_image_grid_shape(size, inputs["in_pinpoints"].tolist(), int(inputs["hp_tile"]))
        patches = late.shape[2]
        total, side = int(crops * patches * rate), round(patches**0.5)
        kept = chosen(method, {"late": late[part], "early": early[part]}, crops, total, mosaic)
        mask = torch.zeros(crops * patches, dtype=torch.bool).index_fill(0, kept, True)
        masks.append(mask.view(crops, patches))
        _, rest = split(total, method.alpha, patches, crops)
        if rest:
            region = regions((side, side), crops - 1, mosaic, method.regions)
            marked = int(patches * (1 - method.alpha))
            scores = importance(early[part][:1])
            budgets.append(crop_budgets(scores, region, crops - 1, marked, rest)[0])
        columns, rows = mosaic  # the wrong way round, as in the transformers that the authors changed
        numbers = torch.arange(patches, crops * patches).view(rows, columns, side, side).transpose(1, 2)
        left = unpad_image(numbers.reshape(1, rows * side, columns * side), size).flatten()
        turn, _ = in_packed_order(kept, torch.cat([torch.arange(patches), left]), crops * patches, False)
        packed.append(features[part].flatten(0, 1)[kept[turn]].float())
    return {
        "out_mask": torch.cat(masks).numpy(),
        "out_sub_budgets": torch.cat(budgets).numpy() if budgets else np.zeros(0, dtype=np.int64),
        "out_packed": torch.cat(packed).numpy(),
        "out_lengths": np.array([len(part) for part in packed]),
    }
