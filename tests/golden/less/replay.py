"""LESS: Adam's steps and signs of gradients, and the samples of largest influence on the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.data_selection.gradients import Checkpoint
from prunelab.common.data_selection.role import best_samples
from prunelab.methods.less.method import LESS, direction, influence, unit


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    given = {name: torch.from_numpy(value) for name, value in inputs.items() if name.startswith("in_")}
    if case.startswith("adam"):
        point = Checkpoint({}, given["in_mean"], given["in_square"], 1e-5, 1)
        steps = {kind: LESS(step=kind).counted(given["in_gradients"], point) for kind in ("adam", "sign")}
        return {f"out_{kind}": step.numpy() for kind, step in steps.items()}
    cosines = []
    for own, targets in zip(given["in_train"], given["in_targets"], strict=True):
        aims = torch.stack([direction(task) for task in targets.chunk(int(inputs["hp_tasks"]))])
        cosines.append(unit(own) @ aims.T)
    scores = influence(cosines, given["in_rates"].tolist()).amax(1)
    chosen = best_samples(scores, Budget(float(inputs["hp_share"])))
    return {"out_scores": scores.numpy(), "out_selected": chosen.index[0].numpy()}
