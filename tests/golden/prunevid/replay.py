"""PruneVid: labels of frames, clusters, what merging leaves of a video, and what the decoder keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.plan import Mix
from prunelab.methods.prunevid.method import (
    PruneVid,
    Segment,
    best_of_groups,
    clustered,
    cross_attention,
    grouped,
    refined,
    runs,
)

TOLERANCE = dict.fromkeys(("merged", "tokens", "hidden", "key_layer1"), (1e-5, 1e-5))
Arrays = Mapping[str, np.ndarray]


def replay(case: str, inputs: Arrays, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    kind = case.split("_")[0]
    return {"refine": labels, "dpc": clusters, "merge": merging, "llm": choosing}[kind](inputs)


def labels(inputs: Arrays) -> dict[str, np.ndarray]:
    made = [refined(row) for row in inputs["in_labels"].tolist()]
    lengths = [[length for _, _, length in runs(row)] for row in made]
    padded = np.zeros((len(made), max(map(len, lengths))), dtype=np.int64)
    for row, own in zip(padded, lengths, strict=True):
        row[: len(own)] = own
    return {"out_refined": np.array(made), "out_segment_lengths": padded}


def clusters(inputs: Arrays) -> dict[str, np.ndarray]:
    tokens = torch.from_numpy(inputs["in_tokens"])
    found = clustered(tokens, int(inputs["hp_clusters"]), int(inputs["hp_k"]))
    return {"out_assignment": found.slot.numpy(), "out_merged": found.mix().apply(tokens).numpy()}


def merging(inputs: Arrays) -> dict[str, np.ndarray]:
    tokens = torch.from_numpy(inputs["in_frames"]).float()
    given = {name: inputs[f"hp_{name}"].item() for name in ("tau", "temporal_segment_ratio", "k", "cluster_ratio")}
    method = PruneVid(similarity=given["tau"], segments=given["temporal_segment_ratio"], neighbours=given["k"])
    noise = torch.zeros(tokens.shape[0], tokens.shape[1] + 1)
    left, parts = method.merged(tokens, given["cluster_ratio"], noise)
    made = Mix(left.target[None], left.source[None], left.weight[None], len(left.place))
    return {
        "out_tokens": made.apply(tokens.flatten(0, 1)[None]).numpy(),
        "out_static_sizes": np.array([part.static for part in parts]),
        "out_dynamic_sizes": np.array([part.dynamic * part.frames for part in parts]),
        "out_window_sizes": np.array([part.frames for part in parts]),
    }


def choosing(inputs: Arrays) -> dict[str, np.ndarray]:
    system, image = int(inputs["hp_system"]), int(inputs["hp_image"])
    sizes = (inputs[f"in_{name}_sizes"].tolist() for name in ("static", "dynamic", "window"))
    parts = [Segment(frames, static, dynamic // frames) for static, dynamic, frames in zip(*sizes, strict=True)]
    rows = torch.from_numpy(inputs["in_attention_text_rows"])[..., system : system + image]
    kept = torch.ones(inputs["in_hidden"].shape[1], dtype=torch.bool)
    scores, groups = cross_attention(rows), grouped(parts, rows.device).unsqueeze(0)
    kept[system : system + image] = best_of_groups(scores, groups, float(inputs["hp_alpha"]))[0]
    index = kept.nonzero().squeeze(1)
    return {
        "out_position_ids": index.unsqueeze(0).numpy(),
        "out_hidden": inputs["in_hidden"][:, index],
        "out_key_layer1": inputs["in_key_layer1"][:, :, index],
        "out_cache_position": np.arange(len(index)),
    }
