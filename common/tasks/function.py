"""A table that a paper's own module computes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from prunelab.common.core.files import ROOT
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Function(Task):
    """Metrics as the function returns them, named table/row/column."""

    name: ClassVar[str] = "function"
    scales: ClassVar[tuple[str, ...]] = ()

    class Settings(base.Settings):
        """call: a function of a module beside the paper's method, `tables:costs` of `methods/<slug>/tables.py`."""

        call: str = Field(pattern=r"^prunelab\.methods\.\w+\.\w+:\w+$")

    def measure(self, bench: Bench[Any]) -> Metrics:
        module, name = bench.settings.call.split(":")
        found: Metrics = getattr(importlib.import_module(module), name)()
        return found

    @classmethod
    def files(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """The module, and the figures of the paper that it may read."""
        module = ROOT / (str(settings["call"]).split(":")[0].removeprefix("prunelab.").replace(".", "/") + ".py")
        read = [path for path in sorted(module.parent.glob("*.csv")) if path.name != "reported.csv"]
        return tuple(str(path.relative_to(ROOT)) for path in (module, *read))

    @classmethod
    def metric(cls, name: str) -> Metric:
        return Metric(name)
