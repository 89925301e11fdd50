"""The mask layer against the code of the same authors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.training.parametrizations import NoiseGate
from prunelab.methods.vtrans.method import log_alpha, noisy, soft_mask

TOLERANCE = {"out_": (1e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    gate = NoiseGate(len(a["in_mu"]))
    with torch.no_grad():
        gate.mean.copy_(a["in_mu"])
        gate.log_variance.copy_(a["in_logD"])
    y = noisy(a["in_x"], gate.mean, gate.log_variance, a["in_eps"])
    divergence = float(a["hp_kl_mult"]) * gate.divergence()
    (y.square().sum() + divergence).backward()
    assert gate.mean.grad is not None and gate.log_variance.grad is not None
    alpha = log_alpha(gate.mean, gate.log_variance).detach()
    assert torch.equal(alpha, gate.log_alpha())
    soft = soft_mask(alpha)
    out = {
        "out_y": y.detach(), "out_kld": divergence.detach(), "out_logalpha": alpha, "out_soft_mask": soft,
        "out_expected_active": soft.sum(), "out_grad_mu": gate.mean.grad, "out_grad_logD": gate.log_variance.grad,
        "out_hard_masks": torch.stack([(alpha < t).float() for t in a["hp_thresholds"]]),
    }  # fmt: skip
    return {name: value.numpy() for name, value in out.items()}
