"""HoloV: which token each output is, and the zero vectors in place of lost shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.plan import Mix
from prunelab.methods.holov.method import HoloV

TOLERANCE = {"": (0.0, 0.0)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    tokens, attention = torch.from_numpy(inputs["in_tokens"]), torch.from_numpy(inputs["in_attn"])
    keep = int(inputs["in_keep"])
    method = HoloV(crops=int(inputs["in_num_patches"]), epsilon=float(inputs.get("in_esp", np.float64(1e-6))))
    slot = method.slots(tokens, attention.view(len(tokens), -1), keep)
    target = torch.arange(keep).expand_as(slot)
    mixed = Mix(target, slot.clamp_min(0), (slot >= 0).float(), keep).apply(tokens)
    return {"out_tokens": mixed.numpy(), "out_positions": slot[0].numpy()}
