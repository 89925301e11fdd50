"""Gates over time, and the module with its losses, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.pat.sparsification import HiddenMask, Sparsified, fixed_gates, gates, identity_loss, mask_loss

TOLERANCE = {"out_": (1e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    a = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    milestone, stays = int(a["hp_global_step"]), int(a["hp_dimdown_dim"])
    out = module(a, milestone, stays) if "in_x" in a else schedule(a, wanted, milestone, stays)
    return {name: value.detach().numpy() for name, value in out.items()}


def schedule(
    a: Mapping[str, torch.Tensor], wanted: Sequence[str], milestone: int, stays: int
) -> dict[str, torch.Tensor]:
    steps, rate = a["in_steps"].tolist(), float(a["hp_alpha"])
    if bool(a["hp_trainable"]):
        found = [gates(a["in_mask"], step, milestone) for step in steps]
        return {"out_scalar": torch.stack(found), "out_scalar_inference": (a["in_mask"] > 0).float()}
    width = int(a["in_mask"].numel()) if "in_mask" in a else 24  # the width is the outputs' alone
    mask = HiddenMask(width, stays, milestone, 0.8, learned=False, rate=rate).eval()
    found = [fixed_gates(width, stays, step, milestone, rate) for step in steps]
    return {"out_scalar": torch.stack(found), "out_scalar_inference": mask()}


def module(a: Mapping[str, torch.Tensor], milestone: int, stays: int) -> dict[str, torch.Tensor]:
    mask = HiddenMask(len(a["in_mask"]), stays, milestone, 0.8, learned=True, rate=2.77)
    hsm = Sparsified(mask, len(a["in_D"]))
    with torch.no_grad():
        mask.proxy.copy_(a["in_mask"])
        hsm.down.copy_(a["in_D"])
        hsm.up.copy_(a["in_U"])
        if "in_scale" in a:
            hsm.scale.copy_(a["in_scale"])
    mask.step = int(a["hp_step"])
    loss = mask_loss(mask.proxy, stays)
    if bool(a["hp_identity_loss"]):
        loss = loss + identity_loss(hsm.down)
    return {"out_y": hsm(a["in_x"]), "out_loss": loss, "out_scalar": mask()}
