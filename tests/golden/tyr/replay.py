"""Týr against the authors' local pruner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.weights.surgery import surgery
from prunelab.common.weights.targets import Observation, Target
from prunelab.methods.tyr.method import Gram, Tyr

TOLERANCE = {"out_hessian": (1e-4, 1e-4), "": (1e-4, 1e-3)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    weight = torch.from_numpy(inputs["in_weight"])
    heads, width = str(inputs["hp_layer_kind"]) == "mha", weight.shape[1]
    method = Tyr(head_rounds=int(inputs["hp_mha_update_iter"]), neuron_rounds=int(inputs["hp_mlp_update_iter"]))
    size = width // int(inputs["hp_num_heads"]) if heads else 1
    unit = "attention_output" if heads else "channels"
    gram = Gram(Target(unit, "layer", 0, unit, (width // size,), span=size))
    for x in torch.from_numpy(inputs["in_x"]):
        gram.update(Observation(x, {}, x, x, x))
    rounds = method.head_rounds if heads else method.neuron_rounds
    found = []
    for sparsity in inputs["hp_sparsities"].tolist():
        stay = int(width // size * (1 - round(sparsity, 6)))  # cut off as the authors' floats are
        found.append(surgery(weight, gram.value(), size, stay, rounds, method.damping, method.gradient)[1])
    pruned, after = torch.stack(found), weight  # candidates leave the layer as it is
    if bool(inputs["hp_error_accumulation"]) and 0 in inputs["hp_sparsities"]:
        after = pruned[inputs["hp_sparsities"].tolist().index(0)]  # but for the released one that loses nothing
    return {
        "out_hessian": gram.value().numpy(),
        "out_sparse_weights": pruned.numpy(),
        "out_col_zero": (pruned == 0).all(1).numpy(),
        "out_layer_weight_after": after.numpy(),
    }
