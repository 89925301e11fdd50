"""Throughput of the published architecture with random weights on a CUDA GPU: weights do not change the speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunelab.common.measures.bench import Bench
from prunelab.common.models import batching, devices, loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.latency import Latency


WARM_UP, REPEATS = 10, 30
CALIBRATION = 32  # images of noise that methods with input-dependent counts are matched on


def measure(bench: Bench[Latency.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.latency`."""
    return timed(bench, devices.gpu(), WARM_UP, REPEATS)


def timed(bench: Bench[Latency.Settings], device: torch.device, warm_up: int, repeats: int) -> dict[str, Any]:
    """See `measure`; on a CPU there is no allocator to ask, and no `memory_gib`."""
    torch.manual_seed(0)
    model = loading.initialised(bench.ids["model"], str(device)).to(torch.bfloat16)
    devices.note(model)
    batch_size, against_dense = bench.settings.batch, bench.settings.against_dense
    x = torch.randn(batch_size, *adapter_for(model).example().shape[1:]).to(device, torch.bfloat16)
    out: dict[str, Any] = {}
    method, budget, parts = bench.method(TokenPruner), None, None
    if method is not None:
        parts = method.build(adapter_for(model).info)  # learned ones are as good untrained
        parts = parts if parts is None else parts.eval().to(device, torch.bfloat16)
        budget = match.match(method, model, bench.budget, x[:CALIBRATION] if method.adaptive else None)
        out["budget"] = {"text": str(budget)}
    with torch.inference_mode():
        # The unpruned model is the larger one, and both are timed on one batch.
        batch = fitting(model, x) if against_dense else batch_size
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with bench.at_work(method, model, budget=budget, parts=parts):
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
    less = "" if batch == batch_size else f", as {batch_size} do not fit"
    protocol = f"random weights in bfloat16; batches of {batch}{less}; median of {repeats} after {warm_up} to warm up"
    return {name: {**metric, "protocol": protocol} for name, metric in out.items()}


def fitting(model: nn.Module, x: Tensor) -> int:
    """How many of the images x [B, C, H, W] the memory holds in one forward pass: B, B / 2, ..."""
    return batching.largest(lambda size: len(model(x[:size])), len(x), "one image")[1]
