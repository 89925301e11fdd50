"""DARE, DAREx-q and AdamR against the authors' functions, and DARE's drop against PEFT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from prunelab.common.weights.statistics import InputMean
from prunelab.methods.darex.adamr import AdamR
from prunelab.methods.darex.analytic import analytic_q
from prunelab.methods.darex.method import Dare, delta, merged

# By name, as the runner reads it: the cases of DARE itself store these names too and compare all others of their kind.
NOT_APPLICABLE = {
    r"out_(dropped|merged)\|(enc1\.bias|enc2\.weight|LayerNorm\.weight|classifier\.weight)$": (
        "the cases of the analytic q store neither the masks nor all fine-tuned tensors that gave these"
    )
}
TOLERANCE = {"out_q": (1e-7, 0.0), "out_merged|out_traj": (1e-8, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items() if array.dtype.kind != "U"}
    if case.startswith("adamr"):
        out = trajectory(a)
    elif case.startswith("analytical"):
        out = analytic(a)
    else:
        out = drop(a)
    return {name: value.numpy() for name, value in out.items()}


def by_name(a: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """The arrays called `start|name`, by name."""
    return {name.removeprefix(f"{start}|"): array for name, array in a.items() if name.startswith(f"{start}|")}


def drop(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop and rescale with the stored mask. What the method leaves alone is stored as its own delta."""
    fine, base, masks = by_name(a, "in_fine"), by_name(a, "in_base"), by_name(a, "in_keep_mask")
    covered = Dare(scope="all")
    out = {}
    for name, value in fine.items():
        change = delta(value, base[name])
        if covered.covers(SimpleNamespace(name=name)):  # type: ignore[arg-type]
            found = (change, change * masks[name], merged(base[name], change, masks[name], float(a["hp_q"])))
        else:
            found = (value, value, value)
        out |= {f"out_{part}|{name}": x for part, x in zip(("delta", "dropped", "merged"), found, strict=True)}
    return out


def analytic(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q of every row and layer from the stored influences, and the influences from deltas and inputs."""
    p, eta, gamma, stop = (round(float(a[f"hp_{n}"]), 6) for n in ("prune_rate", "eta", "gamma_prob", "stop_iter"))
    out = {}
    for name, influences in by_name(a, "in_c_fp16_as_float").items():
        q = analytic_q(influences.half(), p, eta, gamma, stop)
        out |= {f"out_q_rows|{name}": q, f"out_q_mean|{name}": q.mean()}
        change, mean = a[f"in_delta|{name}"], InputMean(None)  # type: ignore[arg-type]
        for sequence in a[f"in_inputs|{name.removesuffix('.weight')}"]:
            mean.update(SimpleNamespace(inputs=sequence))  # type: ignore[arg-type]
        out[f"out_wx|{name}"] = change * mean.value()
    return out


def trajectory(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters after each step under stored gradients."""
    count = sum(name.startswith("in_init") for name in a)
    params = [torch.nn.Parameter(a[f"in_init{i}"].clone()) for i in range(count)]
    lr, decay, beta1, beta2, eps = (float(a[f"hp_{name}"]) for name in ("lr", "wd", "beta1", "beta2", "eps"))
    anchors = [a[f"in_pre{i}"] for i in range(count)]
    optimizer = AdamR(
        params,
        anchors,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=decay,
        l1=bool(a["hp_L1"]),
        amsgrad=bool(a["hp_amsgrad"]),
    )
    path: list[list[Tensor]] = [[] for _ in params]
    for gradients in zip(*(a[f"in_grads{i}"] for i in range(count)), strict=True):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        optimizer.step()
        for kept, param in zip(path, params, strict=True):
            kept.append(param.detach().clone())
    return {f"out_traj{i}": torch.stack(kept) for i, kept in enumerate(path)}
