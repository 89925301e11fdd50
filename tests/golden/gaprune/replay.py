"""GAPrune against the authors' alignment, importance and pruning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunelab.methods.gaprune.method import GAPrune, alignment, local_alignment, smallest

TOLERANCE = {"": (1e-7, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {name: torch.from_numpy(value) for name, value in inputs.items() if value.dtype.kind in "fib"}
    if "in_order" in inputs:
        return pruned(inputs, arrays)
    return aligned(arrays) if "in_general_grad_matrix" in inputs else scored(inputs, arrays)


def aligned(arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    out = {}
    for kind in ("matrix", "vector"):
        general, domain = arrays[f"in_general_grad_{kind}"], arrays[f"in_domain_grad_{kind}"]
        out |= {
            f"out_scalar_{kind}": alignment(general, domain),
            f"out_elementwise_{kind}": local_alignment(general, domain),
        }
    nothing, domain = torch.zeros_like(arrays["in_general_grad_matrix"]), arrays["in_domain_grad_matrix"]
    out["out_scalar_zero_general"] = alignment(nothing, domain)
    out["out_elementwise_zero_general"] = local_alignment(nothing, domain)
    return {name: value.numpy() for name, value in out.items()}


def made(inputs: Mapping[str, np.ndarray]) -> GAPrune:
    """The method with a case's options."""
    return GAPrune(
        float(inputs["hp_beta"]), float(inputs["hp_compression_weight"]), post=str(inputs.get("hp_postproc", "none")),  # type: ignore[arg-type]
        temperature=float(inputs.get("hp_temperature", 1.0)), fusion_alpha=float(inputs.get("hp_fusion_alpha", 0.0)),
        fusion_beta=float(inputs.get("hp_fusion_beta", 1.0)), least=float(inputs.get("hp_rho_min", 0.05)),
        most=float(inputs.get("hp_rho_max", 0.95)),
    )  # fmt: skip


def scored(inputs: Mapping[str, np.ndarray], arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    method = made(inputs)
    weight, domain = arrays["in_weight"], arrays["in_domain_fisher"]
    raw = method.raw(weight, domain, arrays["in_general_fisher"], arrays["in_alignment"])
    return {"out_dai": raw.numpy(), "out_score": method.fused(raw, weight, domain).numpy()}


def pruned(inputs: Mapping[str, np.ndarray], arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    method = made(inputs)
    names = [str(name) for name in inputs["in_order"]]
    scores = []
    for name in names:
        kinds = ("weight", "domain_fisher", "general_fisher", "alignment")
        weight, domain, general, aligned = (arrays[f"in_{kind}|{name}"] for kind in kinds)
        scores.append(method.fused(method.raw(weight, domain, general, aligned), weight, domain))
    gone = int(round(sum(s.numel() for s in scores) * float(inputs["hp_pct"]), 6))
    if str(inputs["hp_strategy"]) == "global":
        kept = smallest(scores, gone)
    else:
        kept = method.uniformly([int(re.findall(r"\d+", name)[0]) for name in names], scores, gone)
    return {f"out_pruned|{name}": (~mask).numpy() for name, mask in zip(names, kept, strict=True)}
