"""GBLM-Pruner against the authors' functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.gblm.method import GBLM, GradientNorm

TOLERANCE = {"out_grad": (0.0, 1e-3), "": (1e-6, 1e-5)}  # gradient norms are float16


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    weight, gradients = torch.from_numpy(inputs["in_weight"]), torch.from_numpy(inputs["in_sample_grads"])
    scale, inverse = float(inputs["hp_scale"]), bool(inputs["hp_inverse"])
    norm, gradient_only = str(inputs["hp_grad_norm"]), str(inputs["hp_method"]) == "gradient"
    method = GBLM(norm, scale, inverse, gradient_only)  # type: ignore[arg-type]
    target = Target("linear", case, 0, "linear", tuple(weight.shape))

    norms = {which: GradientNorm(target, which, scale, half=True) for which in ("l1", "l2")}  # type: ignore[arg-type]
    for gradient in gradients:
        for accumulator in norms.values():
            accumulator.update(gradient)
    statistics = {"gradient_norm": norms[norm].value()}
    if not gradient_only:
        activation = InputNorm(target)
        for sequence in torch.from_numpy(inputs["in_x"]):
            activation.update(SimpleNamespace(inputs=sequence))  # type: ignore[arg-type]
        statistics["input_norm"] = activation.value()

    pruned, every = int(inputs["hp_n"]), int(inputs["hp_m"])
    sparsity = round(float(inputs["hp_sparsity"]), 6)
    budget = Budget(every - pruned, "pattern", every) if every else Budget(1 - sparsity)
    decision = method.solve(target, WeightSignals({"weight": weight}, statistics), budget)
    out = {"out_grad_l1": norms["l1"].value().float(), "out_grad_l2": norms["l2"].value().float()}
    out |= {"out_scaler_row": statistics["input_norm"]} if not gradient_only else {}
    return {name: value.numpy() for name, value in {**out, "out_pruned_mask": ~decision.mask}.items()}
