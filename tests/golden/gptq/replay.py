"""GPTQ and nearest rounding against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.weights.accumulators import Accumulators
from prunelab.common.weights.obs import SecondMoment, dead, falling
from prunelab.common.weights.quantisation import proxy_loss
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Observation, Target, WeightSignals
from prunelab.methods.gptq.method import Gptq, Rtn

TOLERANCE = {"hessian": (1e-5, 1e-5), "error": (1e-4, 1e-4), "weight": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    bits = Budget(int(a["hp_wbits"]), "bits")
    grid: dict[str, Any] = {
        "group": max(int(a["hp_groupsize"]), 0),
        "symmetric": bool(a["hp_sym"]),
        "search": bool(a["hp_mse"]),
    }
    names = {"hp_norm": "power", "hp_grid": "steps", "hp_maxshrink": "shrink"}  # where a case does not say, as released
    grid |= {ours: a[theirs].item() for theirs, ours in names.items() if theirs in a}
    weight = a["in_weight"]
    if "in_x" not in a:
        code = Rtn(**grid).solve(target_of(weight), WeightSignals({"weight": weight}), bits).code
        return {"out_weight": code.dense().numpy(), "out_scale": code.scale.numpy(), "out_zero": code.zero.numpy()}
    method = Gptq(
        **grid,
        act_order=bool(a["hp_actorder"]),
        static_groups=bool(a["hp_static_groups"]),
        damping=float(a["hp_percdamp"]),
        width=int(a["hp_blocksize"]),
    )
    found, hessian = measured(method, weight, a["in_x"])
    code = method.solve(target_of(weight), WeightSignals({"weight": weight}, found), bits).code
    order = falling(found["diagonal"]) if method.act_order else torch.arange(weight.shape[1])
    alive = weight.masked_fill(dead(found["diagonal"]), 0)
    last = int(order[-1] if method.static_groups else weight.shape[1] - 1) // code.group  # the grid used last
    dense = code.dense()
    return {
        "out_weight": dense.numpy(),
        "out_hessian": hessian.numpy(),
        "out_error": np.float64(proxy_loss(alive[:, order], dense[:, order], found["factor"])),
        "out_scale": code.scale[:, last].numpy(),
        "out_zero": code.zero[:, last].numpy(),
    }


def target_of(weight: torch.Tensor) -> Target:
    return Target("linear", "layer", 0, "layer", tuple(weight.shape))


def measured(
    method: WeightPruner, weight: torch.Tensor, inputs: torch.Tensor, tokens: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The method's statistics of sequences [N, T, C] of tokens [N, T], and the Hessian behind them."""
    target = target_of(weight)
    accumulators = Accumulators(method, [target])
    for x, ids in zip(inputs, inputs if tokens is None else tokens, strict=True):
        accumulators.visit(lambda _, x=x, ids=ids: Observation(x, {"weight": weight}, x, x, ids))
    (hessian,) = (a.state for a in accumulators.made["layer"].values() if isinstance(a, SecondMoment))
    return accumulators.values(target), hessian
