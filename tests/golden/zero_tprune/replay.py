"""Zero-TPrune: the importance stage against the authors' early code, the S-stage against a peer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.zero_tprune.method import ZeroTPrune, combine_heads, page_rank, similar_units, start, transition

TOLERANCE = {"": (1e-6, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    def scalar(name: str, default: float) -> float:
        return round(float(inputs[name]), 6) if name in inputs else default

    if case.startswith("sstage"):
        return s_stage(inputs)
    if case.startswith("prune_layer"):
        return prune_layer(inputs, scalar("in_tau", 1.0), scalar("in_retain_rate", 1.0))
    logits = torch.from_numpy(inputs["in_attn_logits"])
    mask = torch.from_numpy(inputs["in_token_mask"]).bool() if "in_token_mask" in inputs else None
    if case.startswith("wpr_headmean"):
        logits = logits.mean(1, keepdim=True)
    attention = transition(logits, scalar("in_tau", 1.0), mask)
    damping = scalar("in_damping_d", 0.0)
    iterations = 1 if case.startswith("single_vote") else int(scalar("in_iters", 5))
    scores = page_rank(attention, start(attention), iterations, damping)[..., 1:]
    combined = scores.squeeze(1) if case.startswith("wpr_headmean") else combine_heads(scores, "rms")
    return {"out_importance": combined.numpy()}


def s_stage(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    importance, features = torch.from_numpy(inputs["in_importance"]), torch.from_numpy(inputs["in_features"])
    gone = similar_units(importance, features, int(inputs["in_r"]))
    order = selection.descending(importance)
    kept = ~gone.gather(1, order)
    released = torch.stack([o[k] for o, k in zip(order, kept, strict=True)])
    return {"out_kept_idx_sorted": released.sort(1).values.numpy(), "out_kept_idx_released_order": released.numpy()}


def prune_layer(inputs: Mapping[str, np.ndarray], tau: float, rate: float) -> dict[str, np.ndarray]:
    x, heads = torch.from_numpy(inputs["in_x"]), int(inputs["in_num_heads"])
    batch, total, width = x.shape

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        weight, bias = (torch.from_numpy(inputs[f"w_{name}.{part}"]) for part in ("weight", "bias"))
        return torch.nn.functional.linear(value, weight, bias)

    q, k, v = linear("qkv", x).view(batch, total, 3, heads, -1).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * (width // heads) ** -0.5
    out = linear("proj", (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    method = ZeroTPrune(layers=(0,), similar=0.0, iterations=(5,), cls_init=False, variance_range=None, temperature=tau)
    info = ModelInfo("golden", 1, heads, width, total, 1, True)
    prunable = torch.ones(batch, total, dtype=torch.bool)
    prunable[:, 0] = False
    sources = {"attention_logits": lambda: logits, "attention": lambda: logits.softmax(-1)}
    signals = TokenSignals(sources, required=method.requires(Site(0)), prunable=prunable, units=total - 1, info=info)
    plan = method.plan(Site(0), signals, Budget(rate))
    kept = torch.zeros(batch, total, dtype=torch.bool).scatter(1, plan.reduce.index, True)  # type: ignore[union-attr]
    attention = transition(logits, tau)
    importance = combine_heads(page_rank(attention, start(attention), 5)[..., 1:], "rms")
    return {"out_attn_out": out.numpy(), "out_importance": importance.numpy(), "out_keep_mask": kept[:, 1:].numpy()}
