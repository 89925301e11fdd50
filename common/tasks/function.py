"""A table that a paper's own module computes: `call: prunelab.methods.<slug>.tables:<function>`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from prunelab.common.experiments.run import Run


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as the function returns them, named table/row/column."""
    module, name = str(run.settings["call"]).split(":")
    return getattr(importlib.import_module(module), name)()
