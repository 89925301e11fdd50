"""ShortGPT against the authors' metric and layer removal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.methods.shortgpt.method import ShortGPT, block_influence
from tests.golden.llama import llama, logits, sequences

TOLERANCE = {"logits": (1e-4, 1e-4), "importance": (1e-6, 1e-4), "": (1e-6, 1e-5)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_input_hidden" in inputs:
        before, after = (torch.from_numpy(inputs[f"in_{end}_hidden"]).flatten(0, 1) for end in ("input", "output"))
        return {
            "out_influence": block_influence(before, after).numpy(),
            "out_angular": block_influence(before, after, "angular").numpy(),
        }
    model, documents = llama(inputs), sequences(inputs["in_ids"])
    method, gone = ShortGPT(int(inputs["hp_stride"])), int(inputs["hp_n_prune_layers"])
    adapter = weight_adapter(model)
    with torch.no_grad():
        found = method.precompute(ModelProbe(adapter, adapter.targets("layers"), documents))
    influence = np.array([float(statistics["influence"]) for statistics in found.values()])
    plan = prune(method, model, Budget(gone, "removed"), documents, progress=False)
    order = influence.argsort(kind="stable")
    removed = [target.block for target, decision in plan.decisions() if not decision.kept]
    return {
        "out_importance": influence,
        "out_order": order,
        "out_removed": np.array(sorted(removed, key=order.tolist().index)),
        "out_pruned_logits": logits(model, documents[0][None, :8]),
    }
