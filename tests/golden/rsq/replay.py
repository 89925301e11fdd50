"""Importance of tokens, and the solver on weighed Hessians, against the authors' code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.weights.targets import Observation, WeightSignals
from prunelab.methods.rsq.method import RSQ
from tests.golden.gptq.replay import measured, target_of

TOLERANCE = {"quantile": (1e-4, 1e-4), "out_H": (1e-4, 1e-4), "out_quant_weight": (1e-4, 1e-4), "out_": (1e-5, 1e-5)}
STRATEGIES = {
    "attncon": "attention", "actnorm": "norm", "actdiff": "change", "tokensim": "distance", "tokenfreq": "frequency",
}  # fmt: skip


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    return importance(a, wanted) if "in_attn" in a else solved(a)


def importance(a: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    observed = Observation(
        a["in_layer_input"][0], {}, a["in_layer_input"][0], a["in_layer_output"][0], a["in_token_freq"],
        attend=lambda: a["in_attn"][0].sum((0, 1)), count=lambda: a["in_token_freq"],
    )  # fmt: skip
    ends: dict[str, Any] = {"low": round(float(a["in_min_value"]), 6), "high": round(float(a["in_max_value"]), 6)}
    return {name: RSQ(**ends, **options(name)).weights(observed).numpy() for name in wanted}


def options(name: str) -> dict[str, Any]:
    """The options that make an output of this name."""
    if match := re.search(r"first(?:last)?n_(\d+(?:_\d+)*)$", name):
        *chosen, of = map(int, match[1].split("_"))
        return {"importance": "parts", "parts": tuple(chosen), "of": of}
    strategy = next(s for s in STRATEGIES if f"_{s}" in name)
    found: dict[str, Any] = {"importance": STRATEGIES[strategy]}
    for option, how in (("quantile", "quantile"), ("truncate", "truncate"), ("masking", "masked"), ("bins", "bins")):
        if match := re.search(rf"_{option}(\d+(?:p\d+)?)", name):
            found[how] = int(match[1]) if how == "bins" else float(match[1].replace("p", "."))
    for ending, how in (("linear", {"normalise": "queries"}), ("sqrt", {"normalise": "root"}),
                        ("square", {"scale": "square"})):  # fmt: skip
        if name.endswith(f"_{ending}"):
            found |= how
    return found


class Given(RSQ):
    """Weights of tokens as the case gives them, without rotations."""

    def weights(self, observed: Observation) -> torch.Tensor:
        return observed.tokens


def solved(a: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    weighed = bool(a["in_weighted"])
    method = (Given if weighed else RSQ)(
        importance="alike", rotation="none", search=bool(a["in_mse_clip"]), act_order=bool(a["in_act_order"]),
        damping=round(float(a["in_percdamp"]), 6),
    )  # fmt: skip
    weight = a["in_weight"]
    found, hessian = measured(method, weight, a["in_inputs"], a["in_token_weights"] if weighed else None)
    code = method.solve(
        target_of(weight), WeightSignals({"weight": weight}, found), Budget(int(a["in_bits"]), "bits")
    ).code
    return {"out_H": hessian.numpy(), "out_scale": code.scale.numpy(), "out_quant_weight": code.dense().numpy()}
