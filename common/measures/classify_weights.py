"""Top-1 accuracy of a classifier whose weights are pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn

from prunelab.common import weights
from prunelab.common.data import images
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.measures.language import sizes
from prunelab.common.metrics import uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.weights.role import WeightPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.classify_weights import ClassifyWeights


BATCH = 100  # images


def measure(bench: Bench[ClassifyWeights.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.classify_weights`."""
    settings, device = bench.settings, bench.device
    model, transform = loading.load(bench.ids["model"], bench.config)
    model = devices.place(model, device)
    report, method = None, bench.method(WeightPruner)
    if method is not None:
        calibration = None
        if method.calibrated:
            drawn = images.drawn(bench.ids["calibration"], bench.config, transform, settings.calibration, bench.seed)
            calibration = [(x.to(device), y) if method.traces else x.to(device) for x, y in drawn]
        report = weights.prune(method, model, bench.budget, calibration, seed=bench.seed, progress=False).report
    data = images.batches(bench.ids["data"], bench.config, transform, settings.samples, BATCH)
    return {"top1": uncertainty.share(correct(model, data, device)), **sizes(model, report)}


@torch.inference_mode()
def correct(model: nn.Module, data: Any, device: torch.device) -> Tensor:
    """Which images the model names rightly, bool [N]."""
    results = []
    for x, y in track(data, "classifying", transient=True):
        logits = finite(model(x.to(device)), "its weights and the budget")
        results.append(logits.argmax(-1).cpu() == y)
    return torch.cat(results)
