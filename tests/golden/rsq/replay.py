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
    "dot": "product", "cluster": "cluster",
}  # fmt: skip
HALVES = {"first_half": 1, "second_half": 0}  # the half that the release's names leave out is the other one
SOLVER = {
    "in_groupsize": "group", "in_blocksize": "width", "in_sym": "symmetric", "in_norm": "power", "in_grid": "steps",
    "in_maxshrink": "shrink", "in_tries": "tries",
}  # fmt: skip  # where a case says so


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
    if half := re.search(r"(first|second)_half", name):
        return {"importance": "parts", "parts": (HALVES[half[0]],), "of": 2, "rest": half[1] == "first"}
    if match := re.search(r"first(?:last)?n_(\d+(?:_\d+)*)$", name):
        *chosen, of = map(int, match[1].split("_"))
        return {"importance": "parts", "parts": tuple(chosen), "of": of}
    strategy = next(s for s in STRATEGIES if f"_{s}" in name)
    chosen_options: dict[str, Any] = {"importance": STRATEGIES[strategy]}
    for option, how in (("quantile", "quantile"), ("truncate", "truncate"), ("masking", "masked"), ("bins", "bins"),
                        ("cluster", "clusters")):  # fmt: skip
        if match := re.search(rf"_{option}_?(\d+(?:p\d+)?)", name):
            number = float(match[1].replace("p", "."))
            chosen_options[how] = int(number) if how in ("bins", "clusters") else number
    for word, how in (("linear", {"normalise": "queries"}), ("sqrt", {"normalise": "root"}),
                      ("square", {"scale": "square"}), ("scalesqrt", {"scale": "root"}), ("raw", {"stretch": False}),
                      ("output", {"side": "output"}), ("reverse", {"reverse": True})):  # fmt: skip
        if re.search(rf"_{word}(?:_|$)", name):
            chosen_options |= how
    return chosen_options


class Given(RSQ):
    """Weights of tokens as the case gives them, without rotations."""

    def weights(self, observed: Observation) -> torch.Tensor:
        return observed.tokens


def solved(a: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    weighed = bool(a["in_weighted"])
    given: dict[str, Any] = {ours: a[theirs].item() for theirs, ours in SOLVER.items() if theirs in a}
    given |= {"group": max(given["group"], 0)} if "group" in given else {}
    method = (Given if weighed else RSQ)(
        importance="alike", rotation="none", search=bool(a["in_mse_clip"]), act_order=bool(a["in_act_order"]),
        damping=round(float(a["in_percdamp"]), 6), **given,
    )  # fmt: skip
    weight = a["in_weight"]
    found, hessian = measured(method, weight, a["in_inputs"], a["in_token_weights"] if weighed else None)
    code = method.solve(
        target_of(weight), WeightSignals({"weight": weight}, found), Budget(int(a["in_bits"]), "bits")
    ).code
    return {"out_H": hessian.numpy(), "out_scale": code.scale.numpy(), "out_quant_weight": code.dense().numpy()}
