"""FLAP, Wanda-sp and Mag-sp against the authors' functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.flap.method import FLAP, MagnitudeSP, WandaSP, importance

TOLERANCE = {"_bias": (4e-5, 1e-5), "": (1e-6, 1e-4)}  # some means are near 1500: a step of their float32 sums is 3e-5
NAMES = {"heads": ("attn", "head", "o"), "channels": ("mlp", "neuron", "down")}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {name: torch.from_numpy(a) for name, a in inputs.items() if a.dtype.kind == "f" and a.ndim}
    layers, width, _ = arrays["in_o_weight"].shape
    head = int(inputs["hp_head_dim"])
    method: WeightPruner
    if str(inputs["hp_method"]) == "flap":
        structure, metric = str(inputs["hp_structure"]), str(inputs["hp_metric"])
        method = FLAP(structure, metric, max(int(inputs["hp_remove_heads"]), 0))  # type: ignore[arg-type]
    else:
        method = WandaSP() if str(inputs["hp_method"]) == "wanda_sp" else MagnitudeSP()

    inner = arrays["in_down_weight"].shape[-1]
    targets, signals = [], []
    for layer in range(layers):
        for unit, (place, _, role) in NAMES.items():
            units, span, size = (width // head, head, 4 * head * width) if unit == "heads" else (inner, 1, 3 * width)
            target = Target(unit, f"{layer}.{unit}", layer, unit, (units,), size, span)  # type: ignore[arg-type]
            accumulators = {name: make(target) for name, make in method.statistics(unit).items()}  # type: ignore[arg-type]
            for sequence in arrays[f"in_{place}_inputs"][layer] if accumulators else ():
                for accumulator in accumulators.values():
                    accumulator.update(SimpleNamespace(inputs=sequence, read=None))
            weights = {role: arrays[f"in_{role}_weight"][layer]}
            targets.append(target)
            signals.append(WeightSignals(weights, {name: a.value() for name, a in accumulators.items()}))

    scores = [method.score(target, seen) for target, seen in zip(targets, signals, strict=True)]
    masks = method.select(targets, signals, scores, Budget(1 - round(float(inputs["hp_ratio"]), 6)))
    out: dict[str, list[Tensor]] = {}
    for target, seen, mask in zip(targets, signals, masks, strict=True):
        place, unit, role = NAMES[target.unit]
        out.setdefault(f"out_{unit}_keep", []).append(mask)
        if isinstance(method, FLAP):
            activity = "scaler" if method.metric == "WIFN" else "fluc"
            unsquared = "_unsquared" if target.unit == "heads" else ""
            metric = importance(method.metric, seen.weights[role], seen["activity"])
            out.setdefault(f"out_{activity}_{place}", []).append(seen["activity"])
            out.setdefault(f"out_metric_{place}{unsquared}", []).append(metric)
            out.setdefault(f"out_baseline_{place}", []).append(seen["input_mean"])
            bias = method.update(target, seen, mask).get(f"{role}.bias", torch.zeros(width))
            out.setdefault(f"out_{role}_bias", []).append(bias)
    return {name: torch.stack(values).numpy() for name, values in out.items()}
