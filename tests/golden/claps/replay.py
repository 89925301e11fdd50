"""ClaPS: rewards, divergences, and the tokens kept, from stored logits of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.methods.claps.method import ClaPS, above_percentile, accuracy, entropy

TOLERANCE = {"out_(entropy|kl)": (1e-4, 1e-5), "out_": (1e-5, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    empty, logits = (torch.from_numpy(inputs[f"in_{name}_class_logits"]) for name in ("base", "token"))
    target, percentile = torch.from_numpy(inputs["in_target"]).long(), float(inputs["in_percentile"])
    units = [str(number) for number in range(len(logits))]

    def ask(prompts):
        return torch.stack([empty if not prompt else logits[int(prompt)] for prompt in prompts])

    services, found = {"class_logits": ask, "targets": target}, {}
    for score, name in (("reward", "reward_diff"), ("kl", "kl")):
        method = ClaPS(score, str(inputs["in_reward_type"]), float(inputs["in_correct_coeff"]),
                       float(inputs["in_incorrect_coeff"]), batch=16)  # fmt: skip
        ranking = method.ranking(units, services)
        kept = method.take(units, ranking, Budget(round(1 - percentile / 100, 6)))
        assert kept == above_percentile(ranking.scores, percentile)
        found |= {f"out_{name}": ranking.scores.numpy(), f"out_kept_{score}": np.array(kept)}
        found["out_base_reward"] = method.rewards(empty, target).numpy()
    return {**found, "out_acc": accuracy(logits, target).numpy(), "out_entropy": entropy(logits).numpy()}
