"""ReAGent on a toy language model, with the stored draws; and the two measures of faithfulness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.metrics.faithfulness import faithfulness
from prunelab.methods.reagent.method import rationalised

TOLERANCE = {"out_": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    given = {name: torch.from_numpy(value) for name, value in inputs.items() if value.dtype.kind not in "US"}
    return measured(given) if "in_wte" in given else explained(given)


def explained(given: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    tokens, weights, uniforms = given["in_ids"][0], given["in_W"], iter(given["in_uniforms"])
    behind = torch.ones_like(given["in_init_logit_scores"])  # what is drawn for steps that nobody takes
    decay = float(given["in_decay"]) ** torch.arange(len(tokens) - 1, -1, -1)

    def logits(contexts):
        return (weights[contexts] * decay[:, None].float()).sum(1)

    top = int(given["in_top_n"]) or math.ceil(float(given["in_top_n_ratio"]) * len(tokens))
    trace = rationalised(
        tokens, int(given["in_target"]), logits, lambda units: given["in_alt"][units], given["in_init_logit_scores"],
        lambda steps: torch.stack([next(uniforms, behind) for _ in range(steps)]),
        ratio=float(given["in_ratio"]), top_n=top, top_k=int(given["in_top_k"]),
        max_steps=int(given["in_max_steps"]),
    )  # fmt: skip
    return {
        "out_masks": trace.masks.numpy(),
        "out_scores_each_step": trace.importance.numpy(),
        "out_stop_each_step": trace.stop.numpy(),
        "out_num_steps": np.array(len(trace.stop)),
        "out_mean_importance": trace.mean().numpy(),
        "out_top_positions": trace.top(top).numpy(),
        "out_rationale": trace.rationale(top, int(given["in_overlap_threshold"]))[None].numpy(),
    }


def measured(given: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    def probabilities(embeddings):
        return (embeddings.sum(1) @ given["in_W"]).softmax(-1)

    found = faithfulness(
        given["in_wte"][0], given["in_importance"][0], probabilities, given["in_prob_original"][0], given["in_uniform"]
    )
    return {
        "out_suff": found.sufficiency.numpy(),
        "out_suff0": found.bare.numpy(),
        "out_comp": found.comprehensiveness.numpy(),
        "out_norm_suff": found.normalised_sufficiency.numpy(),
        "out_norm_comp": found.normalised_comprehensiveness.numpy(),
    }
