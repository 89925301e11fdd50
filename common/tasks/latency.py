"""Throughput of the published architecture with random weights on a CUDA GPU: weights do not change the speed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from common import cost, models, registry
from common.adapters import adapter_for
from common.apply import apply
from common.errors import PrunelabError
from common.papers import Run
from common.roles import TokenPruner
from common.types import Budget

WARM_UP, REPEATS = 10, 30


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics: `images_per_second` (median of 30 timed batches after warm-up, bf16) and `memory_gib` (peak). The
    setting `against_dense` adds `speedup`, the ratio to the unpruned model on the same batch."""
    if not torch.cuda.is_available():
        raise PrunelabError("this row measures a CUDA GPU and none is here; run it with --profile configs/profiles/gpu")
    torch.manual_seed(0)
    model = models.architecture(run.ids["model"]).to_empty(device="cuda").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    shape = adapter_for(model).example().shape
    batch = int(run.settings.get("batch", 256))
    x = torch.randn(batch, *shape[1:], device="cuda", dtype=torch.bfloat16)
    context: Any = nullcontext()
    if run.method is not None:
        method = registry.create(run.method, **run.options)
        assert isinstance(method, TokenPruner)
        context = apply(method, model, cost.match(method, model, Budget.parse(str(run.budget))))
    torch.cuda.reset_peak_memory_stats()
    with context:
        seconds = _median_seconds(model, x)
    peak = torch.cuda.max_memory_allocated()
    out = {
        "images_per_second": {"value": round(batch / seconds, 1), "n": REPEATS},
        "memory_gib": {"value": round(peak / 2**30, 3)},
    }
    if run.settings.get("against_dense"):
        out["speedup"] = {"value": round(_median_seconds(model, x) / seconds, 3), "n": REPEATS}
    return out


def _median_seconds(model: nn.Module, x: Tensor) -> float:
    """Median time of one batch."""
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP + REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(x)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return sorted(times[WARM_UP:])[REPEATS // 2]
