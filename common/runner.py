"""Execute one run and write its record."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import provenance
from common.papers import Run


def execute(run: Run, config: Mapping[str, Any]) -> Path:
    """Run it and write its record whole; the path of the record."""
    import torch

    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    torch.set_num_threads(threads)
    task = importlib.import_module(f"common.tasks.{run.kind}")
    torch.manual_seed(int(run.settings.get("seed", 0)))
    start = time.time()
    metrics = task.execute(run, config)
    cuda = run.scale == "paper" and torch.cuda.is_available()
    path = run.path(Path(config["results"]))
    provenance.write(
        path,
        {
            "identity": run.identity,
            "sources": run.sources,
            "run": asdict(run),
            "metrics": metrics,
            "environment": {
                **provenance.environment(),
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "threads": threads,
                "dtype": "bfloat16" if run.kind == "latency" else "float32",
            },
            "timing": {"started": round(start), "seconds": round(time.time() - start, 2)},
        },
    )
    return path
