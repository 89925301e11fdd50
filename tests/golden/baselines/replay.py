"""Magnitude, Wanda and SparseGPT against the unmodified functions of the Wanda repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights.obs import inverse_factor
from prunelab.common.weights.statistics import InputNorm, SecondMoment
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.magnitude.method import Magnitude
from prunelab.methods.sparsegpt.method import SparseGPT
from prunelab.methods.wanda.method import Wanda

TOLERANCE = {"out_weight": (1e-5, 1e-5), "out_scaler_row|out_metric|out_hessian": (1e-6, 1e-5)}


def accumulate(accumulator: InputNorm | SecondMoment, x: Tensor) -> Tensor:
    """The statistic of sequences x [N, T, C]."""
    for sequence in x:
        accumulator.update(SimpleNamespace(inputs=sequence))  # type: ignore[arg-type]
    return accumulator.value()


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    weight = torch.from_numpy(inputs["in_weight"])
    target = Target("linear", case, 0, "linear", tuple(weight.shape))
    pruned, every = int(inputs["hp_n"]), int(inputs["hp_m"])
    sparsity = round(float(inputs["hp_sparsity"]), 6)
    budget = Budget(every - pruned, "pattern", every) if every else Budget(round(1 - sparsity, 6))
    method: Magnitude | Wanda | SparseGPT
    statistics: dict[str, Tensor] = {}
    out: dict[str, Tensor] = {}
    if case.startswith("magnitude"):
        method = Magnitude()
    else:
        x = torch.from_numpy(inputs["in_x"])
        statistics["input_norm"] = accumulate(InputNorm(target), x)
        if case.startswith("wanda"):
            method = Wanda(variant="variant" in case)
            out["out_scaler_row"] = statistics["input_norm"]
            out["out_metric"] = method.score(target, WeightSignals({"weight": weight}, statistics))
        else:
            method = SparseGPT(damping=round(float(inputs["hp_percdamp"]), 6), width=int(inputs["hp_blocksize"]))
            out["out_hessian"] = accumulate(SecondMoment(target), x)
            statistics["inverse_factor"] = inverse_factor(out["out_hessian"], method.damping)
    decision = method.solve(target, WeightSignals({"weight": weight}, statistics), budget)
    out["out_pruned_mask"] = ~decision.mask
    out["out_weight"] = decision.values.get("weight", weight) * decision.mask
    return {name: value.numpy() for name, value in out.items()}
