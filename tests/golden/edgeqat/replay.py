"""Quantisers, the choice of tokens and the losses against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.common.training.parametrizations import FakeQuantised
from prunelab.methods.edgeqat.quantisers import (
    ActivationQuantised,
    distribution_loss,
    entropy,
    entropy_loss,
    likeness,
    logits_loss,
    low_bit_tokens,
)

TOLERANCE = {"out_loss|out_total": (1e-4, 1e-4), "out_": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    out = tokens(a) if "in_percent" in a else losses(a) if "in_ratios" in a else quantisers(a)
    return {name: value.detach().numpy() for name, value in out.items()}


def tokens(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    logits = a["in_q"] @ a["in_k"].transpose(-1, -2) / a["in_q"].shape[-1] ** 0.5
    first = logits[..., 0]
    return {
        "out_pre_softmax_logits_col0": first,
        "out_scores": first.mean(0).sum(0)[None],
        "out_low_bit_idx": low_bit_tokens(first, round(float(a["in_percent"]), 6))[None],
    }


def losses(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    attn, weight, temperature, alpha = (round(float(r), 6) for r in a["in_ratios"])
    alike = [likeness(s, t) for s, t in zip(a["in_student_attn"], a["in_teacher_attn"], strict=True)]
    informed = [entropy(q, k) for q, k in zip(a["in_student_q"], a["in_student_k"], strict=True)]
    out = {
        "out_loss_attn": distribution_loss(alike, attn),
        "out_loss_entropy": entropy_loss(informed, weight),
        "out_loss_logits": logits_loss(a["in_student_logits"], a["in_teacher_logits"], temperature),
    }
    own = alpha * a["in_student_ce"] + (1 - alpha) * out["out_loss_logits"]
    return out | {"out_total": own + out["out_loss_attn"] + out["out_loss_entropy"]}


def quantisers(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for bits in (8, 4):
        x, module = a["in_x"].clone().requires_grad_(), ActivationQuantised(bits)
        y = module(x)
        start = {"alpha": module.step.clone(), "zero_point": module.zero.clone(), "signed": module.signed}
        y.square().sum().backward()
        grads = {"x": x.grad, "alpha": module.step.grad, "zero_point": module.zero.grad}
        out[f"out_act{bits}"] = y
        out |= {f"out_act{bits}_{name}": value for name, value in start.items()}
        out |= {f"out_act{bits}_grad_{name}": value for name, value in grads.items() if value is not None}
    for bits in (4, 2):
        weight, quantiser = a[f"in_w{bits}_weight"].clone().requires_grad_(), FakeQuantised(bits)
        y = a["in_x"] @ quantiser(weight).T
        y.square().sum().backward()
        out |= {f"out_w{bits}": y, f"out_w{bits}_alpha": quantiser.step.detach().view(1)}
        assert weight.grad is not None and quantiser.step.grad is not None
        out |= {f"out_w{bits}_grad_weight": weight.grad, f"out_w{bits}_grad_alpha": quantiser.step.grad.view(1)}
    return out
