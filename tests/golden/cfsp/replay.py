"""CFSP against the authors' function: block importance, allocation and the neurons that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.cfsp.method import CFSP, kept_shares

TOLERANCE = {"": (1e-7, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {name: torch.from_numpy(a) for name, a in inputs.items() if a.dtype.kind == "f" and a.ndim}
    coarse, fine = str(inputs["hp_global"]), str(inputs["hp_local"])
    method = CFSP(
        "uniform" if coarse == "avg_base" else coarse,  # type: ignore[arg-type]
        "wanda" if fine == "wanda_base" else fine,  # type: ignore[arg-type]
        *(round(float(inputs[f"hp_{name}"]), 6) for name in "abc"),
        multiple=128 if bool(inputs["hp_cuda_friendly"]) else 0,
    )
    keep = 1 - round(float(inputs["hp_ratio"]), 6)
    hidden, inner = arrays["in_block_hidden"], arrays["in_down_inputs"]
    targets, signals = [], []
    for layer in range(len(inner)):
        target = Target("channels", str(layer), layer, "channels", (inner.shape[-1],))
        accumulators = {name: make(target) for name, make in method.statistics("channels").items()}
        for sample in range(inner.shape[1]):
            seen = SimpleNamespace(
                inputs=inner[layer, sample], before=hidden[layer, sample], after=hidden[layer + 1, sample]
            )
            for accumulator in accumulators.values():
                accumulator.update(seen)
        weights = {role: arrays[f"in_{role}_weight"][layer] for role in ("gate", "up", "down")}
        targets.append(target)
        signals.append(WeightSignals(weights, {name: a.value() for name, a in accumulators.items()}))

    scores = [method.score(target, seen) for target, seen in zip(targets, signals, strict=True)]
    masks = method.select(targets, signals, scores, Budget(keep))
    influences = torch.stack([seen["influence"] for seen in signals])
    return {
        "out_layer_importance": influences.numpy(),
        "out_layer_keep_ratio": kept_shares(influences, keep, method.a).numpy(),
        "out_neuron_keep": torch.stack(list(masks)).numpy(),
    }
