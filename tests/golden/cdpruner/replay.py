"""CDPruner: which tokens the authors' code keeps of every crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.methods.cdpruner.method import kernel, most_probable, relevance


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    features, image, text = (torch.from_numpy(inputs[f"in_{name}"]) for name in ("features", "image", "text"))
    unit = torch.nn.functional.normalize
    likeness = (unit(image, dim=-1) @ unit(text, dim=-1).T).mean(-1)  # [crops, N]
    weights = relevance(likeness.flatten().unsqueeze(0)).view_as(likeness)  # its range is that of all crops
    picks = most_probable(kernel(features, weights), int(inputs["in_count"]))
    return {"out_mask": torch.zeros_like(likeness, dtype=torch.bool).scatter(1, picks, True).numpy()}
