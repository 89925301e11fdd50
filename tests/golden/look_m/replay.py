"""LOOK-M's cases: a layer's cache behind a prompt with images."""

from __future__ import annotations

from typing import Any

import torch

from prunelab.common.core.attention import accumulated
from prunelab.methods.look_m.method import merged, nearest, text_first


def replay(case: str, inputs: dict[str, Any], wanted: Any) -> dict[str, Any]:
    queries, keys, values = (torch.from_numpy(inputs[name]) for name in ("queries", "keys", "values"))
    visual = torch.from_numpy(inputs["visual"])
    received = accumulated(queries, keys, 3 / keys.shape[-1] ** 0.5)
    tokens = keys.shape[2]
    heavy, recent = int(tokens * float(inputs["hh"])), int(tokens * float(inputs["recent"]))
    last = torch.arange(tokens).expand(1, -1) >= tokens - recent
    text = ~visual & ~last
    count = max(heavy, int(text.sum())) + recent
    kept = text_first(received, text, last, torch.ones_like(visual), [count])
    gone = torch.ones_like(received, dtype=torch.bool).scatter(2, kept.index, False)
    place = nearest(keys, kept)
    return {
        "out_keys": merged(keys, kept, gone, place, "pivot").numpy(),
        "out_values": merged(values, kept, gone, place, "pivot").numpy(),
    }
