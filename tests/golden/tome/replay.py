"""ToMe: matching, merge and schedule against the official functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.selection import bipartite_matching
from prunelab.methods.tome.method import schedule

LIST_LAYERS = 6  # the list form stores no number of layers; its documentation names this one


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if case.startswith("parse_r"):
        out = {"out_list": np.array(schedule(LIST_LAYERS, [int(v) for v in inputs["in_list"]]))}
        for name in wanted:
            if name != "out_list":
                layers, removed, inflection = inputs[name.replace("out_", "in_")].tolist()
                out[name] = np.array(schedule(int(layers), int(removed), round(inflection, 6)))
        return out
    metric, x = torch.from_numpy(inputs["in_metric"]), torch.from_numpy(inputs["in_x"])
    batch, total, _ = x.shape
    distill = bool(inputs["in_distill_token"])
    matching = bipartite_matching(
        metric, int(inputs["in_r"]), class_token=bool(inputs["in_class_token"]), distill_token=distill
    )
    ones = torch.ones(batch, total)
    sizes = torch.from_numpy(inputs["in_size"]).squeeze(-1) if "in_size" in inputs else ones
    mix = matching.mix(sizes)
    merged = mix.apply(x)
    slot = matching.slot
    if distill:  # the released unmerge forgets that the distillation token was moved to place 1
        unmerged = matching.outputs - total // 2
        slot = torch.where(slot == 1, unmerged, torch.where((slot > 1) & (slot <= unmerged), slot - 1, slot))
    return {
        "out_x": merged.numpy(),
        "out_size": matching.total(sizes).unsqueeze(-1).numpy(),
        "out_source": (mix.matrix(total) > 0).numpy(),
        "out_unmerged": merged.gather(1, slot.unsqueeze(-1).expand_as(x)).numpy(),
        "out_merge_mean": matching.mix(ones).apply(x).numpy(),
    }
