"""DART: pivots, the order in which they choose, and what stays, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.dart.method import DART, key_norm, pivots, set_order

TOLERANCE = {"": (0.0, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    hidden, keys = (torch.from_numpy(inputs[name]).float() for name in ("in_hidden", "in_key"))
    norm, eps = torch.from_numpy(inputs["w_norm"]).float(), float(inputs["hp_rms_eps"])
    start, image = int(inputs["hp_system"]), int(inputs["hp_image"])
    method = DART(image_pivots=int(inputs["hp_pivot_image"]), text_pivots=int(inputs["hp_pivot_text"]))
    places = torch.arange(hidden.shape[1]).unsqueeze(0)
    prunable = (places >= start) & (places < start + image)
    number = method.image_pivots + method.text_pivots
    each = int((1 - float(inputs["hp_reduction_ratio"])) * image / number)  # cut off as floats are
    signals = TokenSignals(
        {"normed": lambda: nn.functional.rms_norm(hidden, norm.shape, norm, eps), "keys": lambda: keys},
        prunable=prunable,
        units=image,
        info=ModelInfo("golden", 3, keys.shape[1], hidden.shape[2], hidden.shape[1]),
        indices=places,
    )
    kept = method.plan(Site(2, "input"), signals, Budget(min(each * number, image), "count")).reduce.index[0]  # type: ignore[union-attr]
    (images, _), (text, _) = (
        pivots(key_norm(keys), prunable, method.image_pivots),
        pivots(key_norm(keys), places >= start + image, method.text_pivots),
    )
    both = torch.cat([images, text], 1)
    return {
        "out_pivot_image": images[0].numpy(),
        "out_pivot_text": text[0].numpy(),
        "out_pivot_visit_order": both.gather(1, set_order(both, torch.ones_like(both).bool()))[0].numpy(),
        "out_retained_sorted": kept[prunable[0, kept]].numpy(),
        "out_position_ids": kept.numpy(),
        "out_hidden": hidden[:, kept].numpy(),
    }
