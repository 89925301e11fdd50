"""AMP against the authors' hooks and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.amp.method import AMP

TOLERANCE = {"": (1e-6, 1e-5)}
NAMES = {"heads": ("attn", "head"), "channels": ("mlp", "neuron")}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    method = AMP(str(inputs["hp_criterion"]))  # type: ignore[arg-type]
    output = torch.from_numpy(inputs["in_o_weight"])
    layers, width, _ = output.shape
    head, inner = int(inputs["hp_head_dim"]), inputs["in_mlp_inputs"].shape[-1]
    targets, signals = [], []
    for layer in range(layers):
        for unit, (place, _) in NAMES.items():
            units, span, size = (width // head, head, 4 * head * width) if unit == "heads" else (inner, 1, 3 * width)
            target = Target(unit, f"{layer}.{unit}", layer, unit, (units,), size, span)  # type: ignore[arg-type]
            weights = {"o": output[layer], "k": output[layer]}  # the accumulator reads the size of k alone
            accumulator = method.statistics(target.unit)["importance"](target)  # type: ignore[call-arg]
            for prompt, length in enumerate(inputs["in_lens"]):
                x = torch.from_numpy(inputs[f"in_{place}_inputs"][layer, prompt, :length])
                accumulator.update(SimpleNamespace(inputs=x, weights=weights))
            targets.append(target)
            signals.append(WeightSignals(weights, {"importance": accumulator.value()}))

    scores = [method.score(target, seen) for target, seen in zip(targets, signals, strict=True)]
    masks = method.select(targets, signals, scores, Budget(1 - round(float(inputs["hp_ratio"]), 6)))
    out: dict[str, list[Tensor]] = {}
    for target, seen, mask in zip(targets, signals, masks, strict=True):
        unit = NAMES[target.unit][1]
        out.setdefault(f"out_{unit}_importance", []).append(seen["importance"])
        out.setdefault(f"out_{unit}s_pruned", []).append((~mask).nonzero().flatten())
    left = sum(t.size * int(mask.sum()) for t, mask in zip(targets, masks, strict=True))
    assert left == int(inputs["hp_params_after"])
    return {name: torch.stack(values).numpy() for name, values in out.items()}
