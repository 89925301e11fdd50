"""Exact cost of a method on an architecture, counted on the meta device: no weights, no data, no scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prunelab.common.core import files
from prunelab.common.core.learned import PARTS
from prunelab.common.costs import meter
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.macs import Macs


# MACs of unpruned models and what passes through their norms, by what decides them, so that a process which makes many
# runs counts them once.
_UNPRUNED: dict[str, tuple[float, int]] = {}


def measure(bench: Bench[Macs.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.macs`."""
    model, settings = loading.architecture(bench.ids["model"]), bench.settings
    example = adapter_for(model).example()
    if settings.size is not None:
        example = example.new_empty(*example.shape[:2], *settings.size)
    embed = getattr(model, "patch_embed", None)
    embedding = 0.0 if embed is None else meter.flops(lambda: meter.on_meta(embed, example)) / 2
    key = files.digest([bench.ids["model"], settings.size])
    if key not in _UNPRUNED:
        _UNPRUNED[key] = meter.macs(model, example), meter.norm_elements(model, example)
    dense, elements = _UNPRUNED[key]
    total, scoring, norms = dense, 0.0, 5 * elements
    method = bench.method(TokenPruner)
    if method is not None:
        with torch.device("meta"):
            parts = method.build(adapter_for(model).info)
        if parts is not None:
            model.add_module(PARTS, parts)
        budget = match.match(method, model, bench.budget)
        with applied(method, model, budget) as handle, torch.no_grad():
            norms = 5 * meter.norm_elements(model, example)
            report = handle.report(example, dense)
            total, scoring = report.macs, report.scoring_macs
    figures = {
        "macs": total,
        "scoring": scoring,
        "dense": dense,
        "fvcore": total - scoring + norms,
        "blocks": total - scoring + norms - embedding,
    }
    saving = {"saving": 1 - total / dense}
    if settings.module is not None:
        inside = meter.module_macs(model, example, settings.module)
        figures |= {"module_macs": inside - (dense - total), "module_dense": inside}
        saving["module_saving"] = (dense - total) / inside
    metrics: dict[str, Any] = {name: {"value": round(value / 1e9, 5)} for name, value in figures.items()}
    return metrics | {name: {"value": round(100 * value, 3)} for name, value in saving.items()}
