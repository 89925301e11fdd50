"""Top-1 accuracy of a classifier, pruned or not, with the MACs it really used."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from common import cost, metrics, models, registry
from common.adapters import adapter_for
from common.apply import apply
from common.data import images
from common.errors import PrunelabError
from common.papers import Run
from common.roles import TokenPruner
from common.types import Budget

BATCH = 50
CALIBRATION = 32  # images that methods with input-dependent counts are matched on


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics: `top1` in percent with per-image bits, `gmacs` and `scoring_gmacs` an image, `saving` in percent, and
    the `budget` that a matched cost came to. The setting `against_dense` adds `drop`: points of top-1 lost to the
    unpruned model on the same images."""
    device = "cuda" if run.scale == "paper" and torch.cuda.is_available() else "cpu"
    model, transform = models.load(run.ids["model"], config)
    model = model.to(device)
    samples, seed = run.settings.get("samples"), int(run.settings.get("seed", 0))  # no limit: the whole set

    def data(count: int | None) -> Any:
        return images.batches(run.ids["data"], config, transform, count, BATCH)

    def correct() -> Tensor:
        """Which images the model, pruned or not, names rightly."""
        found = []
        for x, y in track(data(samples), "classifying", total=samples and -(-samples // BATCH), transient=True):
            logits = model(x.to(device))
            if not bool(torch.isfinite(logits).all()):
                raise PrunelabError("the model's output holds NaN or infinite values; check its weights and the images")
            found.append(logits.argmax(-1).cpu() == y)
        return torch.cat(found)

    out: dict[str, Any] = {}
    context: Any = nullcontext()
    if run.method is not None:
        method = registry.create(run.method, **run.options)
        assert isinstance(method, TokenPruner)
        calibration = next(iter(data(CALIBRATION)))[0].to(device) if method.adaptive else None
        budget = cost.match(method, model, Budget.parse(str(run.budget)), calibration)
        out["budget"] = {"text": str(budget)}
        context = apply(method, model, budget, seed=seed)
    with context as handle, torch.inference_mode():
        right = correct()
        if handle is not None:
            report = handle.report()
            used, scoring = report.macs, report.scoring_macs
        else:
            used, scoring = cost.macs(model, adapter_for(model).example()), 0.0
        dense = cost.macs(model, adapter_for(model).example()) if handle is None else report.dense_macs
    out["top1"] = metrics.share(right)
    if run.settings.get("against_dense"):
        with torch.inference_mode():
            lost = 100.0 * (correct().float() - right.float())
        out["drop"] = metrics.mean(lost.tolist())
    out["gmacs"] = {"value": round(used / 1e9, 6)}
    out["scoring_gmacs"] = {"value": round(scoring / 1e9, 6)}
    out["saving"] = {"value": round(100 * (1 - used / dense), 3)}
    return out
