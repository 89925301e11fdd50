"""FiCoCo-V's cases: which patches go and what they join, and what becomes of those that stay."""

from __future__ import annotations

from typing import Any

import torch

from prunelab.common.core import selection
from prunelab.methods.ficoco.method import above, compressed, correlated, importance, penalised


def replay(case: str, inputs: dict[str, Any], wanted: Any) -> dict[str, Any]:
    gone = torch.from_numpy(inputs["gone"])
    if "out_x" in wanted:
        x, targets, shares = (torch.from_numpy(inputs[name]) for name in ("x", "targets", "shares"))
        return {"out_x": compressed(x.shape[1], gone, targets, shares).apply(x).numpy()}
    attention = torch.from_numpy(inputs["attention"]).unsqueeze(0)
    patches = attention.shape[1] - 1
    scores = penalised(importance(attention, 1), torch.arange(patches).unsqueeze(0), 8)
    chosen = selection.descending(-scores)[:, : gone.shape[1]] + 1
    targets, shares = correlated(attention, gone, above(patches + 1, float(inputs["quantile"])))
    return {"out_gone": chosen.sort(-1).values.numpy(), "out_targets": targets.numpy(), "out_shares": shares.numpy()}
