"""Sparse pre-training against the authors' schedule and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.sparse_pretraining.method import events, keep_fractions, pruned

TOLERANCE = {"": (1e-7, 1e-6)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    target, every = float(inputs["hp_target"]), int(inputs["hp_freq"])
    count = len(events(int(inputs["hp_start"]), int(inputs["hp_end"]), every))
    fractions = keep_fractions(1 - target, count)
    skip, pattern = str(inputs["hp_do_not_prune_kw"]), str(inputs["hp_structure"]) == "2:4"
    names = [name.removeprefix("in_").removesuffix("/kernel") for name in inputs if name.endswith("/kernel")]
    kernels = {name: torch.from_numpy(inputs[f"in_{name}/kernel"]) for name in names}
    masks = {name: torch.from_numpy(inputs[f"in_{name}/mask"]).bool() for name in names}
    own = [name for name in names if not (skip and skip in name)]
    out: dict[str, np.ndarray] = {"out_per_step_sparsity": np.array(1 - fractions[0])}
    thresholds = []
    for number, keep in enumerate(fractions):
        found, threshold = pruned([(kernels[name] * masks[name]).abs() for name in own], keep, pattern)
        masks |= {name: mask & masks[name] for name, mask in zip(own, found, strict=True)}
        thresholds.append(threshold)
        out |= {f"out_iter{number}_{name}/mask": masks[name].float().numpy() for name in names}
    return {**out, "out_keep_fractions": np.array(fractions), "out_thresholds": np.array(thresholds)}
