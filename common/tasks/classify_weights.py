"""Top-1 accuracy of a classifier whose weights are pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from prunelab.common import weights
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import images
from prunelab.common.experiments.run import Run
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.tasks.perplexity import reads_text, sizes
from prunelab.common.weights.role import WeightPruner

BATCH, CALIBRATION = 100, 128  # images


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics: `top1` in percent with per-image bits, and what `sizes` finds of the weights.

    Settings: `samples` images (all there are); `calibration`, how many training images to calibrate with, where the
    method measures anything; `seed` of their draw and of random methods. Batch norms keep their statistics.
    """
    device = devices.of(run.scale)
    model, transform = loading.load(run.ids["model"], config)
    model = devices.place(model, device)
    report = None
    if run.method is not None:
        method = registry.create(run.method, **run.options)
        if not isinstance(method, WeightPruner):
            raise PrunelabError(f"{method.name} is a {method.role}, which prunes no weights; use the kind classify")
        seed, calibration = int(run.settings.get("seed", 0)), None
        if reads_text(method):
            count = int(run.settings.get("calibration", CALIBRATION))
            calibration = [x.to(device) for x in images.drawn(run.ids["calibration"], config, transform, count, seed)]
        budget = Budget.parse(str(run.budget))
        report = weights.prune(method, model, budget, calibration, seed=seed, progress=False).report
    data = images.batches(run.ids["data"], config, transform, run.settings.get("samples"), BATCH)
    return {"top1": uncertainty.share(correct(model, data, device)), **sizes(model, report)}


@torch.inference_mode()
def correct(model: nn.Module, data: Any, device: torch.device) -> Tensor:
    """Which images the model names rightly, bool [N]."""
    found = []
    for x, y in track(data, "classifying", transient=True):
        logits = model(x.to(device))
        if not bool(torch.isfinite(logits).all()):
            raise PrunelabError("the model's output holds NaN or infinite values; check its weights and the budget")
        found.append(logits.argmax(-1).cpu() == y)
    return torch.cat(found)
