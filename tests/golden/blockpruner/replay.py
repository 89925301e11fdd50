"""BlockPruner against the authors' greedy search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.methods.blockpruner.method import ROLES, BlockPruner, greedy
from tests.golden.llama import llama, logits

TOLERANCE = {"logits": (1e-4, 1e-4), "ppl": (0.0, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    model, windows = llama(inputs), list(torch.from_numpy(inputs["in_ids"]).flatten(0, 1))
    padding, steps = int(inputs["hp_pad_token_id"]), int(inputs["hp_del_block_num"])
    method = BlockPruner(str(inputs["hp_block_type"]), None if padding < 0 else padding)  # type: ignore[arg-type]
    adapter = weight_adapter(model)
    probe = ModelProbe(adapter, adapter.targets("sublayers"), windows)
    candidates = [t for role in ROLES[method.block_type] for t in probe.targets if t.role == role]
    with torch.no_grad():
        dense = method.perplexity(probe, [])
        search = greedy(candidates, lambda gone: method.perplexity(probe, gone))
        found = [next(search) for _ in range(steps)]
    plan = prune(method, model, Budget(steps, "removed"), windows, progress=False)
    removed = [[int(target.role == "mlp"), target.block] for target, _ in found]
    gone = [[int(t.role == "mlp"), t.block] for t, decision in plan.decisions() if not decision.kept]
    assert sorted(gone) == sorted(removed)
    return {
        "out_dense_ppl": np.array(dense),
        "out_removed": np.array(removed),
        "out_candidate_ppl": np.array([sorted(tried, key=np.isnan) for _, tried in found]),  # those that are gone last
        "out_best_ppl": np.array([np.nanmin(tried) for _, tried in found]),
        "out_pruned_logits": logits(model, windows[0][None, :8]),
    }
