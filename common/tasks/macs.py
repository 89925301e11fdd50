"""Exact cost of a method on an architecture, counted on the meta device: no weights, no data, no scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.learned import PARTS
from prunelab.common.costs import meter
from prunelab.common.experiments.run import Run
from prunelab.common.models import loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics in G (1e9), one image: `macs` (with scoring), `scoring`, `dense`, `saving` in percent, `fvcore` (the
    count of the papers' tool: MACs without scoring, 5 a LayerNorm element) and `blocks` (fvcore's without the patch
    embedding). Methods whose counts depend on the input have no such cost: their MACs are measured on data.

    Settings: `size` [height, width] of the image; `module`, the path of the submodule in which the method works, adds
    `module_macs`, `module_dense` and `module_saving`, its cost alone with the scoring."""
    model = loading.architecture(run.ids["model"])
    example = adapter_for(model).example()
    if "size" in run.settings:
        example = example.new_empty(*example.shape[:2], *run.settings["size"])
    embed = getattr(model, "patch_embed", None)
    embedding = 0.0 if embed is None else meter.flops(lambda: meter.on_meta(embed, example)) / 2
    dense = meter.macs(model, example)
    total, scoring, norms = dense, 0.0, 5 * meter.norm_elements(model, example)
    if run.method is not None:
        method = registry.create(run.method, **run.options)
        assert isinstance(method, TokenPruner)
        with torch.device("meta"):
            parts = method.build(adapter_for(model).info)
        if parts is not None:
            model.add_module(PARTS, parts)
        budget = match.match(method, model, Budget.parse(str(run.budget)))
        with applied(method, model, budget) as handle, torch.no_grad():
            norms = 5 * meter.norm_elements(model, example)
            report = handle.report(example)
            total, scoring = report.macs, report.scoring_macs
    figures = {
        "macs": total,
        "scoring": scoring,
        "dense": dense,
        "fvcore": total - scoring + norms,
        "blocks": total - scoring + norms - embedding,
    }
    saving = {"saving": 1 - total / dense}
    if "module" in run.settings:
        inside = meter.module_macs(model, example, run.settings["module"])
        figures |= {"module_macs": inside - (dense - total), "module_dense": inside}
        saving["module_saving"] = (dense - total) / inside
    metrics: dict[str, Any] = {name: {"value": round(value / 1e9, 5)} for name, value in figures.items()}
    return metrics | {name: {"value": round(100 * value, 3)} for name, value in saving.items()}
