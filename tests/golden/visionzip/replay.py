"""VisionZip: what is kept of a crop and what the rest becomes, how crops are put together, and the signals read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core import attention, selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.visionzip.method import VisionZip, dominance

TOLERANCE = {"index": (0.0, 0.0), "": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    given = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    if "in_x" in given:
        return signals_of_a_layer(given)
    dominant, contextual = int(given["hp_dominant"]), int(given["hp_contextual"])
    scores = dominance(given["in_cls_attention"]).index_fill(1, torch.tensor([0]), float("inf"))
    order = selection.descending(scores)[:, :dominant]
    out: dict[str, Tensor] = {"out_index_topk_order": order}
    method, budget = VisionZip(contextual=contextual), Budget(dominant + contextual, "count")
    if "in_grid_wh" not in given:
        out |= {"out_index_sorted": order.sort(-1).values, "out_tokens": plan(method, given, budget, 1, None)}
    else:
        columns, rows = given["in_grid_wh"].tolist()
        crops = {name: given[name].unsqueeze(0) for name in ("in_hidden", "in_key_mean", "in_cls_attention")}
        tokens = plan(method, crops, budget, rows * columns + 1, (rows, columns))[0]
        image = torch.nn.functional.linear(tokens, given["w_projector_weight"], given["w_projector_bias"])
        ids = given["in_input_ids"][0]
        place = int((ids == -200).nonzero())
        words = [given["w_embed"][part] for part in (ids[:place], ids[place + 1 :])]
        out |= {"out_image_tokens": image, "out_inputs_embeds": torch.cat([words[0], image, words[1]]).unsqueeze(0)}
    return {name: value.numpy() for name, value in out.items()}


def plan(
    method: VisionZip, given: Mapping[str, Tensor], budget: Budget, crops: int, mosaic: tuple[int, int] | None
) -> Tensor:
    """What goes on [B, K, C] of features [B, 1 + N, C], or [1, crops, 1 + N, C] of one image."""
    hidden, keys, rows = given["in_hidden"], given["in_key_mean"].unsqueeze(1), given["in_cls_attention"]
    if crops > 1:
        hidden, keys, rows = hidden.flatten(1, 2), keys.flatten(2, 3), rows.transpose(1, 2).flatten(2)
    prunable = torch.ones(hidden.shape[:2], dtype=torch.bool)
    prunable.unflatten(1, (crops, -1))[:, :, 0] = False
    site, units = Site(0, "encoded", class_token=True), hidden.shape[1] - crops
    side = round((units // crops) ** 0.5)
    (keys_reading,) = (r for r in method.requires(site) if not isinstance(r, str))
    signals = TokenSignals(
        {"cls_row": lambda: rows, keys_reading: lambda: keys},
        prunable=prunable,
        units=units,
        info=ModelInfo("golden", 1, 1, 1, 1),
        grids=((side, side),) * crops,
        mosaic=mosaic,
    )
    return method.plan(site, signals, budget).reduce.apply(hidden)


def signals_of_a_layer(given: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    heads, parts = int(given["hp_heads"]), {}
    for name in ("q", "k", "v"):
        made = torch.nn.functional.linear(given["in_x"], given[f"w_{name}_proj_weight"], given[f"w_{name}_proj_bias"])
        parts[name] = made.unflatten(2, (heads, -1)).transpose(1, 2)
    maps = attention.weights(parts["q"], parts["k"], parts["q"].shape[-1] ** -0.5)
    mixed = (maps @ parts["v"]).transpose(1, 2).flatten(2)
    output = torch.nn.functional.linear(mixed, given["w_out_proj_weight"], given["w_out_proj_bias"])
    row = attention.row(parts["q"], parts["k"], parts["q"].shape[-1] ** -0.5, 0)
    return {
        "out_attn_output": output.numpy(),
        "out_attn_cls_row": row.numpy(),
        "out_key_mean": parts["k"].mean(1).numpy(),
    }
