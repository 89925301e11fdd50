"""Rho-1: tokens by excess loss, of all samples together and of each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.methods.rho1.method import excess_loss, keep


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    labels = torch.from_numpy(inputs["in_labels"])
    beyond = torch.arange(labels.shape[1]) >= torch.from_numpy(inputs["in_lengths"])[:, None]
    excess = excess_loss(*(torch.from_numpy(inputs[f"in_loss_{name}"]) for name in ("current", "reference")))
    budget, responses = Budget(float(inputs["hp_data_prop"])), (labels != -100) & ~beyond
    return {
        "out_keep_global": keep(excess, responses, budget).numpy(),
        "out_keep_sample": keep(excess, responses, budget, "sample").numpy(),
    }
