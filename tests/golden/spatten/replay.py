"""SpAtten: the authors' variant for chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.plan import take
from prunelab.methods.spatten.method import chat_positions


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    sizes = [int(inputs[f"in_{part}"]) for part in ("start_size", "important_size", "recent_size", "num_coming")]
    kept = chat_positions(torch.from_numpy(inputs["in_attn_logits"]), *sizes)  # [layers, 1, H, K]
    moved = {
        f"out_{part}": take(torch.from_numpy(inputs[f"in_{part}"]).flatten(0, 1), kept.flatten(0, 1)).unsqueeze(1)
        for part in ("k", "v")
    }
    return {"out_positions": kept.squeeze(1).numpy(), **{name: value.numpy() for name, value in moved.items()}}
