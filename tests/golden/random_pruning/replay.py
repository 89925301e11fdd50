"""Random pruning against the authors' layer-wise densities, masks and SNIP ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.methods.random_pruning.method import RandomPruning, drawn, left_of, snip_scores

TOLERANCE = {"": (1e-7, 1e-6)}
FIRST = (8, 3, 3, 3)  # the layer that `uniform_plus` leaves out of its list


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_x" in inputs:
        return {"out_layer_sparsity": np.array([1 - d for d in snip(inputs)])}
    ratio = str(inputs["hp_mode"]).lower()
    method = RandomPruning(ratio, float(inputs["hp_power"]))  # type: ignore[arg-type]
    shapes = [tuple(int(n) for n in shape if n) for shape in inputs["in_shapes"]]
    before = [FIRST] if ratio == "uniform_plus" else []
    densities = method.densities([*before, *shapes], float(inputs["hp_density"]))[len(before) :]
    rng = torch.Generator().manual_seed(int(inputs["hp_mask_seed"]))
    masks = drawn(shapes, densities, rng, least=False)
    return {
        "out_layer_density": np.array(densities),
        "out_actual_density": np.array([float(m.float().mean()) for m in masks]),
        **{f"out_mask_{i}": m.float().numpy() for i, m in enumerate(masks)},
    }


def snip(inputs: Mapping[str, np.ndarray]) -> list[float]:
    state = {k.removeprefix("in_param_"): torch.from_numpy(v) for k, v in inputs.items() if k.startswith("in_param_")}
    names = [f"{name}.weight" for name in ("conv", "block1", "block2", "block3", "fc")]
    weights = [state[name].requires_grad_() for name in names]
    logits = forward(state, torch.from_numpy(inputs["in_x"]))
    gradients = torch.autograd.grad(F.cross_entropy(logits, torch.from_numpy(inputs["in_y"])), weights)
    return left_of([s.detach() for s in snip_scores(weights, gradients)], float(inputs["hp_keep_ratio"]))


def forward(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    norm = [state[f"bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = F.relu(F.batch_norm(F.conv2d(x, state["conv.weight"]), *norm))
    for name in ("block1", "block2", "block3"):
        x = F.relu(F.conv2d(x, state[f"{name}.weight"]))
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
