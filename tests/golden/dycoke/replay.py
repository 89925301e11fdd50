"""DyCoke: what stays of a video before the decoder, and what steps of decoding read of the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.plan import take
from prunelab.methods.dycoke.method import DyCokeCache, likeness, read_entries, temporal_merging

TOLERANCE = {"similarity": (1e-6, 0.0)}
Arrays = Mapping[str, np.ndarray]


def replay(case: str, inputs: Arrays, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if case.startswith("ttm"):
        return merging(inputs)
    return gathering(inputs) if case.startswith("cache") else deciding(inputs)


def merging(inputs: Arrays) -> dict[str, np.ndarray]:
    tokens = torch.from_numpy(inputs["in_features"]).float()
    keep = int((1 - float(inputs["hp_k"])) * int(inputs["hp_tokens_per_frame"]))  # rounded as the authors' floats are
    place = temporal_merging(tokens, keep, odd_frame="drop")
    return {"out_rows": place.numpy(), "out_tokens": tokens.flatten(0, 1)[place].numpy()}


def deciding(inputs: Arrays) -> dict[str, np.ndarray]:
    start, length, p = (inputs[f"hp_{name}"].item() for name in ("image_start", "image_length", "p"))
    counts = torch.tensor([int(length * (1 - p))])
    before, similarity, found = None, [], {}
    for step, size in enumerate(inputs["in_row_length"].tolist()):
        row = torch.from_numpy(inputs["in_attention_rows"][step, :, :size]).mean(0, keepdim=True)
        index = torch.arange(size).unsqueeze(0)
        visual = (index >= start) & (index < start + length)
        row = row.masked_fill(~visual, 0)
        similarity.append(likeness(row, before).item())
        moved = similarity[-1] < DyCokeCache.threshold
        reads = read_entries(row, visual, counts)[0].nonzero().squeeze(1)
        found[f"out_kept_step{step}"] = reads.numpy() if moved else np.zeros(0, dtype=np.int64)
        before = row
    found["out_similarity"] = np.array(similarity)
    found["out_pruned"] = np.array(similarity) < DyCokeCache.threshold
    return found


def gathering(inputs: Arrays) -> dict[str, np.ndarray]:
    """What attention sees of each layer; the cache keeps all of it."""
    found, stored = {}, []
    for name in ("key", "value"):
        held = torch.cat([torch.from_numpy(inputs[f"in_{part}_{name}"]) for part in ("past", "new")], dim=3)
        kept = torch.from_numpy(inputs["in_kept"]).expand(*held.shape[:3], -1)
        found[f"out_{name}"] = take(held, kept).numpy()
        stored.append(held.shape[3])
    return {**found, "out_stored_length": np.array(stored)}
