"""Sparse weights with their gradients, and the schedule, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.training.schedule import Cubic
from prunelab.methods.pst.method import SparseWeight

TOLERANCE = {"out_": (1e-5, 1e-4)}
FACTORS = {
    "weight_U": "u", "weight_V": "v", "mask_scores_A": "a", "mask_scores_B": "b", "mask_scores_R": "r",
    "mask_scores_C": "c",
}  # fmt: skip


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    if "in_step" in a:
        start, end = (round(float(a[f"hp_{name}"]), 6) for name in ("initial", "final"))
        shares = {n: round(float(a[f"hp_{o}_warmup"]), 6) for n, o in (("warmup", "initial"), ("cooldown", "final"))}
        rise = Cubic.of(int(a["hp_total"]), start, end, **shares, whole=False)
        return {"out_sparsity": np.array([rise(step) for step in a["in_step"].tolist()], dtype=np.float32)}
    beta, alpha1, alpha2, sparsity = (round(float(a[f"hp_{n}"]), 6) for n in ("beta", "alpha1", "alpha2", "sparsity"))
    weight = a["in_weight"]
    module = SparseWeight(tuple(weight.shape), a["in_U"].shape[1], a["in_A"].shape[1], beta, alpha1, alpha2)
    with torch.no_grad():
        for name in FACTORS:
            getattr(module, FACTORS[name]).copy_(a[f"in_{name.rpartition('_')[2]}"])
    module.gone = Budget(1 - sparsity).pruned(weight.numel())
    masked = module(weight)
    y = a["in_x"] @ masked.T + a["in_bias"]
    y.backward(a["in_grad_out"])
    mask = module.mask(module.scores(module.updated(weight)))
    out = {"out_y": y, "out_masked_weight": masked, "out_mask": mask}
    out |= {f"out_grad_{name}": getattr(module, short).grad for name, short in FACTORS.items()}
    return {name: value.detach().numpy() for name, value in out.items()}
