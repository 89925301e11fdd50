"""Execute one run and write its record."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelab.common import tasks
from prunelab.common.experiments import forecast, provenance
from prunelab.common.experiments.run import Run
from prunelab.common.metrics import uncertainty
from prunelab.common.tasks.base import Metrics

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


def gpus_needed(runs: Iterable[Run]) -> int:
    """How many GPUs the process that makes these runs one after the other takes."""
    return max((run.gpus for run in runs if run.scale == "paper"), default=0)


def measure(run: Run, config: Mapping[str, Any]) -> Metrics:
    """The metrics of a run, by its task; over several seeds their means."""
    settings = tasks.get(run.task).read(run.settings)
    if settings.seeds > 1:
        rest = {key: value for key, value in run.settings.items() if key != "seeds"}
        each = range(settings.seed, settings.seed + settings.seeds)
        return uncertainty.over_seeds([measure(replace(run, settings={**rest, "seed": s}), config) for s in each])
    return tasks.get(run.task)().measure(bench(run, config))


def bench(run: Run, config: Mapping[str, Any]) -> Bench[Any]:
    """What a run is measured with. Raises PrunelabError where its task does not take its settings, method or budget."""
    from prunelab.common.measures.bench import Bench

    task = tasks.get(run.task)
    task.admit(run.method, run.budget)
    return Bench(run.scale, run.ids, task.read(run.settings), config, run.method, run.options, run.budget)


def execute(run: Run, config: Mapping[str, Any]) -> Path:
    """Run it and write its record whole; the path of the record."""
    import torch

    from prunelab.common.models import batching, devices

    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    torch.set_num_threads(threads)
    torch.manual_seed(int(run.settings.get("seed", 0)))
    devices.begin()
    if run.scale == "paper" and (memory := devices.memory()):
        forecast.check_fits(run, memory)
    started, clock = time.time(), time.monotonic()  # the time of day may be set meanwhile
    try:
        metrics = measure(run, config)
    except torch.OutOfMemoryError:
        raise batching.too_small("what this run computes at once") from None
    path = run.path(Path(config["results"]))
    provenance.write(
        path,
        {
            "identity": run.identity,
            "sources": run.sources,
            "run": asdict(run),
            "metrics": metrics,
            "environment": {**provenance.environment(), **devices.environment(), "threads": threads},
            "timing": {"started": round(started), "seconds": round(time.monotonic() - clock, 2)},
        },
    )
    return path
