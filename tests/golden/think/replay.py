"""ThinK's cases: channels that go of a prompt's keys, and of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.think.method import energy, query_driven, weakest


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    share = float(inputs["in_ratio"])
    if "in_values" in inputs:
        values = torch.from_numpy(inputs["in_values"])
        return {"out_pruned": values.masked_fill(weakest(energy(values), share).unsqueeze(2), 0).numpy()}
    queries, keys = (torch.from_numpy(inputs[name]) for name in ("in_queries", "in_keys"))
    gone = weakest(query_driven(energy(queries[:, :, -32:]), energy(keys)), share)
    if "out_pruned" in wanted:
        return {"out_pruned": keys.masked_fill(gone.unsqueeze(2), 0).numpy()}
    end = keys.shape[2] - int(inputs["in_recent"])
    left = torch.stack([keys[0, head, :end, ~gone[0, head]] for head in range(keys.shape[1])]).unsqueeze(0)
    return {"out_stays": (~gone).numpy(), "out_left": left.flatten().numpy(), "out_last": keys[:, :, end:].numpy()}
