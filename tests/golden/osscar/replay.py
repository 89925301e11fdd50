"""OSSCAR's cases: a layer pruned group by group, and exchanged by the local search."""

from __future__ import annotations

from typing import Any

import torch

from prunelab.common.weights.surgery import damped, surgery
from prunelab.methods.osscar.method import searched

TOLERANCE = {"": (1e-8, 1e-6)}


def replay(case: str, inputs: dict[str, Any], wanted: Any) -> dict[str, Any]:
    weight, gram = torch.from_numpy(inputs["weight"]), torch.from_numpy(inputs["gram"])
    size, stay = int(inputs["size"]), int(inputs["stay"])
    groups = len(gram) // size
    silent = int((gram.diagonal() == 0).sum()) // size
    rounds = max(1, (groups - stay - silent) // int(inputs["every"]))
    kept, pruned = surgery(weight, gram, size, stay, rounds, 0.01, gradient=False)
    out = {"out_pruned": pruned.numpy()}
    if "out_searched" in wanted:
        hessian = damped(gram, 0.01)
        dense = weight.T.clone()
        dense[gram.diagonal() == 0] = 0
        target = hessian @ dense
        found = searched(pruned.T, hessian, target, kept, size, int(inputs["tries"]), int(inputs["swap"]))[1]
        out["out_searched"] = found.T.numpy()
    return out
