"""Top-1 accuracy of a classifier, pruned or not, with the MACs it really used."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn

from prunelab.common.costs import meter
from prunelab.common.data import images
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.metrics import uncertainty
from prunelab.common.models import batching, devices, loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import Handle
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.classify import Classify


BATCH = {"cpu": 50, "cuda": 256}  # images at a time; a GPU halves it where its memory ends
CALIBRATION = 32  # images that methods with input-dependent counts are matched on


def measure(bench: Bench[Classify.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.classify`."""
    device, settings = bench.device, bench.settings
    model, transform = loading.load(bench.ids["model"], bench.config)
    model = devices.place(model, device, half=True)
    dtype, batch = next(model.parameters()).dtype, BATCH[device.type]
    samples = settings.samples  # no limit: the whole set

    def data(count: int | None) -> Any:
        return images.batches(bench.ids["data"], bench.config, transform, count, batch)

    def correct(handle: Handle | None = None) -> Tensor:
        """Which images the model, pruned or not, names rightly."""
        result, slices, forward = [], batching.Slices("one image"), partial(one_pass, model, handle)
        for x, y in track(data(samples), "classifying", total=samples and -(-samples // batch), transient=True):
            logits = finite(slices(forward, x.to(device, dtype)), "its weights and the images")
            result.append(logits.argmax(-1).cpu() == y)
        return torch.cat(result)

    out: dict[str, Any] = {}
    method, budget = bench.method(TokenPruner), None
    if method is not None:
        calibration = next(iter(data(CALIBRATION)))[0].to(device, dtype) if method.adaptive else None
        budget = match.match(method, model, bench.budget, calibration)
        out["budget"] = {"text": str(budget)}
    with bench.at_work(method, model, budget=budget) as handle, torch.inference_mode():
        right = correct(handle)
        if handle is not None:
            report = handle.report()
            used, scoring = report.macs, report.scoring_macs
        else:
            used, scoring = meter.macs(model, adapter_for(model).example()), 0.0
        dense = meter.macs(model, adapter_for(model).example()) if handle is None else report.dense_macs
    out["top1"] = uncertainty.share(right)
    if settings.against_dense:
        with torch.inference_mode():
            lost = 100.0 * (correct().float() - right.float())
        out["drop"] = uncertainty.mean(lost.tolist())
    out["gmacs"] = {"value": round(used / 1e9, 6)}
    out["scoring_gmacs"] = {"value": round(scoring / 1e9, 6)}
    out["saving"] = {"value": round(100 * (1 - used / dense), 3)}
    return out


def one_pass(model: nn.Module, handle: Handle | None, x: Tensor) -> Tensor:
    """Logits [B, classes] of the images x [B, C, H, W]. What a pass that ends for want of memory has added to the
    counts of the method at work is taken back, since its images come again."""
    undo = None if handle is None else handle.application.trace.mark()
    try:
        logits: Tensor = model(x)
    except torch.OutOfMemoryError:
        if undo is not None:
            undo()
        raise
    return logits
