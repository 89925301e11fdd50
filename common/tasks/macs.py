"""Exact cost of a method on an architecture, counted on the meta device: no weights, no data, no scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from common import cost, models, registry
from common.adapters import adapter_for
from common.apply import apply
from common.papers import Run
from common.roles import TokenPruner
from common.types import Budget


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics in G (1e9), one image: `macs` (with scoring), `scoring`, `dense`, `saving` in percent, `fvcore` (the
    count of the papers' tool: MACs without scoring, 5 a LayerNorm element) and `blocks` (fvcore's without the patch
    embedding). Methods whose counts depend on the input have no such cost: their MACs are
    measured by the `classify` task."""
    model = models.architecture(run.ids["model"])
    example = adapter_for(model).example()
    embedding = cost.flops(lambda: cost.on_meta(model.patch_embed, example)) / 2  # type: ignore[arg-type]
    dense = cost.macs(model, example)
    total, scoring, norms = dense, 0.0, 5 * cost.norm_elements(model, example)
    if run.method is not None:
        method = registry.create(run.method, **run.options)
        assert isinstance(method, TokenPruner)
        budget = cost.match(method, model, Budget.parse(str(run.budget)))
        with apply(method, model, budget) as handle, torch.no_grad():
            norms = 5 * cost.norm_elements(model, example)
            report = handle.report()
            total, scoring = report.macs, report.scoring_macs
    figures = {
        "macs": total,
        "scoring": scoring,
        "dense": dense,
        "fvcore": total - scoring + norms,
        "blocks": total - scoring + norms - embedding,
    }
    metrics: dict[str, Any] = {name: {"value": round(value / 1e9, 5)} for name, value in figures.items()}
    metrics["saving"] = {"value": round(100 * (1 - total / dense), 3)}
    return metrics
