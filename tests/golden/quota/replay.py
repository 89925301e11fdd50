"""QuoTA: shares, budgets, shapes and tokens of all five assigners against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo
from prunelab.common.tokens.adapters.vlm_prompt import with_newlines
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.quota.method import SCORES, Assigner, QuoTA, capped, sharpened

ASSIGNERS: dict[str, Assigner] = {"v1": "bilinear", "v2": "average", "v3": "linspace", "v4": "merge", "v5": "axes"}
TOLERANCE = {"weights": (1e-12, 1e-12), "": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_weights" in inputs:
        shares = capped(torch.from_numpy(inputs["in_weights"]), float(inputs["in_max_value"]))
        return {"out_weights": shares.numpy()}
    features, scores = torch.from_numpy(inputs["in_features"]).float(), torch.from_numpy(inputs["in_scores"])
    frames, units, _ = features.shape
    side, total = int(inputs["in_side"]), int(inputs["in_total_frames_budget"]) * int(inputs["in_tokens_per_frame"])
    method = QuoTA("query", ASSIGNERS[str(inputs["in_version"])])
    hidden = features.flatten(0, 1).unsqueeze(0)
    signals = TokenSignals(
        {"hidden": lambda: hidden},
        prunable=torch.ones(hidden.shape[:2], dtype=torch.bool),
        units=hidden.shape[1],
        info=ModelInfo("golden", 1, 1, hidden.shape[2], hidden.shape[1]),
        required=method.requires(method.sites(ModelInfo("golden", 1, 1, 1, 1))[0]),
        services={SCORES: [scores]},
        grids=((side, side),) * frames,
    )
    plan = method.plan(method.sites(signals.info)[0], signals, Budget(total, "count"))
    tokens, layout = plan.reduce.apply(hidden)[0], plan.layout
    assert layout is not None
    most = ((side + 1) // 2) ** 2 if method.assigner == "merge" else units
    shares = sharpened(scores)
    if method.assigner != "bilinear":
        shares = capped(shares, most / total)
    found = {
        "out_norm_weights": shares.numpy(),
        "out_budget": np.array(method.counts(total, frames, most, scores)),
        "out_shapes": shapes(layout[0]),
        "out_tokens": tokens.numpy(),
    }
    if "in_newline" in inputs:
        newline = torch.from_numpy(inputs["in_newline"]).float()
        found["out_with_newline"] = with_newlines(tokens, layout[0], newline, "row").numpy()
    return found


def shapes(layout: torch.Tensor) -> np.ndarray:
    """Height and width, or number of tokens, of each frame in a layout [K, 3]."""
    found = []
    for frame in layout[:, 0].unique().tolist():
        own = layout[layout[:, 0] == frame]
        found.append([len(own)] if int(own[0, 1]) < 0 else (own.amax(0)[1:] + 1).tolist())
    return np.array(found)
