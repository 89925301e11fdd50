"""ssToken: labels after the selection. The authors' code takes as many tokens for the prompt as there are labels of
-100, wherever these stand; on their own data, whose prompts come first, that is the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.data_selection.losses import token_loss
from prunelab.common.data_selection.role import best_tokens
from prunelab.methods.sstoken.method import combined, draw, retrospective_excess_loss


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_labels_padded" in inputs:
        responses = torch.from_numpy(inputs["in_labels_padded"]) != -100
        budget = Budget(round(float(inputs["in_prop"]), 6))
        return {"out_selected": draw(responses, budget, int(inputs["in_seed"])).numpy()}
    labels, logits = (torch.from_numpy(inputs[f"in_{name}"])[None] for name in ("labels", "logits"))
    prompt = int((labels == -100).sum())
    responses = (torch.arange(labels.shape[1]) >= prompt)[None]
    attention = torch.from_numpy(inputs["in_attn_headmean"])[None, :, :prompt].sum(-1)
    rel = retrospective_excess_loss(torch.from_numpy(inputs["in_ref_losses"])[None], token_loss(logits, labels))
    gamma = float(inputs["in_gamma"]) if bool(inputs["in_use_ref"]) else 0.0
    scores = combined(rel, attention, responses, gamma)
    kept = best_tokens(scores, responses, Budget(round(float(inputs["in_rho"]), 6)), up=True)
    return {
        "out_labels": labels.masked_fill(responses & ~kept, -100)[0].numpy(),
        "out_kept": kept.sum().numpy(),
    }
