"""IST: scores after every step, with the stored draws and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.ist.method import IST, updated

GIVEN = {  # what a case may say; otherwise as released
    "in_rl_lr": "rate", "in_rl_step": "trials", "in_update_importance_interval_steps": "interval",
    "in_response_suppression_factor": "damping", "in_suppressed_share": "suppressed", "in_updated_share": "trained",
}  # fmt: skip
TRAINED = 0.25  # share of the layers that are trained at a step, which is the budget
TOLERANCE = {"out_scores": (1e-6, 1e-6)}
NOT_APPLICABLE = {"out_active": "layers drawn at random, by draws that are not stored"}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    layers = int(inputs["in_num_layers"])
    given = {ours: inputs[theirs].item() for theirs, ours in GIVEN.items() if theirs in inputs}
    method = IST(**{name: value for name, value in given.items() if name != "trained"})
    scores, found = torch.from_numpy(inputs["in_initial_score"]), []
    for step, damped, losses in zip(
        inputs["in_global_steps"].tolist(), inputs["in_suppressed"], inputs["in_losses"], strict=True
    ):
        if step > 0 and step % method.interval == 0:
            scores = updated(scores, torch.from_numpy(damped).bool(), torch.from_numpy(losses), method.rate)
        found.append(scores)
    return {
        "out_scores": torch.stack(found).numpy(),
        "out_n_updated": np.array(int(given.get("trained", TRAINED) * layers)),
        "out_n_suppressed": np.array(int(method.suppressed * layers)),
    }
