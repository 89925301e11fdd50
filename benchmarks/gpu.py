"""What a GPU at hand measures in under ten minutes, in one go.

`python -m benchmarks.gpu [--minutes 10] [--layers 24] [--dry]`. First a written token with every cache method at a
quarter of the cache, over plain decoding; then a step of Token Recycling at the shape of a 0.5B model; then, as long as
the minutes last, the rows of published tables that only a GPU can make: throughput with Zero-TPrune, time to the first
token with HoliTom. `--dry` does the first two on the CPU and small, and of the rows makes ready what they
are run with, which finds mistakes before a GPU is lent.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from benchmarks import drafting, kv_cache
from prunelab.common import tasks
from prunelab.common.catalogue import lookup
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import plans, runner
from prunelab.common.experiments.run import Run
from prunelab.common.kv_cache import applied

PAPERS = ("zero_tprune", "holitom")
STEPS = 32


def written(model: Any, tokens: Tensor, name: str | None, draft: Any) -> float:
    """Median seconds a written token behind the prompt, of which a draft tells some methods what matters."""
    cache, last, times = DynamicCache(), tokens[:, :1], []
    services = {"draft": draft}
    method: Any = None if name is None else registry.create(name)
    with nullcontext() if method is None else applied(method, model, Budget(0.25), services=services):
        model(tokens, past_key_values=cache, logits_to_keep=1)
        for _ in range(STEPS):
            times.append(drafting.seconds(lambda: model(last, past_key_values=cache)))
    return statistics.median(times)


@torch.inference_mode()
def overheads(device: torch.device, count: int) -> Table:
    """Of every cache method, in turns with plain decoding."""
    layers = 4 if device.type == "cpu" else 16
    model, draft = (kv_cache.decoder(count + STEPS + 1, layers=n).to(device) for n in (layers, 1))
    tokens = torch.randint(1024, (1, count), generator=torch.Generator().manual_seed(0)).to(device)
    table = Table(title=f"a written token behind {count}, time over the unpruned cache's, on {device}")
    for header in ("method", "a quarter of the cache"):
        table.add_column(header, justify="left" if header == "method" else "right")
    for name in sorted(name for name, cls in registry.load().items() if cls.role == "cache_pruner"):
        try:
            table.add_row(name, f"{written(model, tokens, name, draft) / written(model, tokens, None, draft):.2f}")
        except PrunelabError as error:
            table.add_row(name, f"not on this model: {error}")
    return table


def rows() -> Iterator[Run]:
    """The runs of published tables that only a GPU can make, paper by paper in turns."""
    config = lookup.settings({"papers": ",".join(PAPERS), "scale": "paper", "gpu": "1"})
    runs = [run for run in plans.of(config).runs.values() if run.scale == "paper" and tasks.get(run.task).needs_gpu]
    return iter(sorted(runs, key=lambda run: (run.method or "", run.task, run.identity)))


def title(run: Run) -> str:
    model = " ".join(name for kind, name in run.names if kind == "model") or str(run.ids.get("model", ""))[:60]
    return " ".join(filter(None, (run.task, run.method or "unpruned", run.budget, model)))


def published(console: Console, until: float, *, dry: bool) -> None:
    """Measure the rows one by one, as long as time lasts, or make them ready."""
    config = lookup.settings({"gpu": "" if dry else "1"})
    left = 0
    for run in rows():
        if not dry and time.monotonic() > until:
            left += 1
            continue
        if dry:
            method = runner.bench(run, config).method()
            console.print(f"ready: {title(run)}" + (f" ({type(method).__name__})" if method else ""), soft_wrap=True)
            continue
        values = {name: metric["value"] for name, metric in runner.measure(run, config).items()}
        console.print(title(run), values, soft_wrap=True)
    if left:
        console.print(f"{left} rows did not fit into the minutes; give more with --minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--layers", type=int, default=drafting.LAYERS)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA GPU here; --dry runs what a CPU can")
    console, until = Console(), time.monotonic() + 60 * arguments.minutes
    device = torch.device("cpu" if arguments.dry else "cuda")
    console.print(overheads(device, 128 if arguments.dry else 4096))
    drafting.report(2 if arguments.dry else arguments.layers, 2 if arguments.dry else 15, device)
    published(console, until, dry=arguments.dry)


if __name__ == "__main__":
    main()
