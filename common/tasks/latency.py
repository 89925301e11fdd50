"""Throughput of the published architecture with random weights on a CUDA GPU: weights do not change the speed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments.run import Run
from prunelab.common.models import batching, devices, loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

WARM_UP, REPEATS = 10, 30
CALIBRATION = 32  # images of noise that methods with input-dependent counts are matched on


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics: `images_per_second`, from the median of 30 timed batches after warm-up in bfloat16; `memory_gib`, the
    most that the allocator held in 2^30 bytes; the `batch` it was, at most the setting `batch` and halved until the
    memory holds it; and the `budget` that a matched cost came to. The setting `against_dense` adds `speedup`, the
    ratio to the unpruned model on the same batch."""
    device = devices.of("paper")
    if device.type != "cuda":
        raise PrunelabError("this row measures a CUDA GPU and none is here; run it with --profile configs/profiles/gpu")
    return timed(run, device, WARM_UP, REPEATS)


def timed(run: Run, device: torch.device, warm_up: int, repeats: int) -> dict[str, Any]:
    """See `execute`; on a CPU there is no allocator to ask, and no `memory_gib`."""
    torch.manual_seed(0)
    model = loading.initialised(run.ids["model"], str(device)).to(torch.bfloat16)
    devices.note(model)
    asked = int(run.settings.get("batch", 256))
    x = torch.randn(asked, *adapter_for(model).example().shape[1:]).to(device, torch.bfloat16)
    against_dense = bool(run.settings.get("against_dense"))
    out: dict[str, Any] = {}
    context: Any = nullcontext()
    if run.method is not None:
        method = registry.create(run.method, **run.options)
        if not isinstance(method, TokenPruner):
            raise PrunelabError(f"throughput is measured under token pruners; {method.name} is a {method.role}")
        budget = match.match(method, model, Budget.parse(str(run.budget)), x[:CALIBRATION] if method.adaptive else None)
        out["budget"] = {"text": str(budget)}
        context = applied(method, model, budget, seed=int(run.settings.get("seed", 0)))
    with torch.inference_mode():
        # The unpruned model is the larger one, and both are timed on one batch.
        batch = fitting(model, x) if against_dense else asked
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with context:
            batch = fitting(model, x[:batch])
            seconds = devices.median_seconds(lambda: model(x[:batch]), device, warm_up=warm_up, repeats=repeats)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        if against_dense:
            dense = devices.median_seconds(lambda: model(x[:batch]), device, warm_up=warm_up, repeats=repeats)
            out["speedup"] = {"value": round(dense / seconds, 3), "n": repeats}
    out["images_per_second"] = {"value": round(batch / seconds, 1), "n": repeats}
    out["batch"] = {"value": batch}
    if memory is not None:
        out["memory_gib"] = {"value": round(memory / 2**30, 3)}
    less = "" if batch == asked else f", as {asked} do not fit"
    told = f"random weights in bfloat16; batches of {batch}{less}; median of {repeats} after {warm_up} to warm up"
    return {name: {**metric, "protocol": told} for name, metric in out.items()}


def fitting(model: nn.Module, x: Tensor) -> int:
    """How many of the images x [B, C, H, W] the memory holds in one forward pass: B, B / 2, ..."""
    return batching.largest(lambda size: len(model(x[:size])), len(x), "one image")[1]
