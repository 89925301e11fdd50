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
        """call: a function of a module beside the paper's method, `tables:costs` of `methods/<slug>/tables.py`.
        testbeds: those whose shipped weights it reads. arguments: what it is called with, by name."""

        call: str = Field(pattern=r"^prunelab\.methods\.\w+\.\w+:\w+$")
        testbeds: tuple[str, ...] = ()
        arguments: Mapping[str, Any] = {}

    def measure(self, bench: Bench[Any]) -> Metrics:
        module, name = bench.settings.call.split(":")
        result: Metrics = getattr(importlib.import_module(module), name)(**bench.settings.arguments)
        return result

    @classmethod
    def files(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """The module, the figures of the paper that it may read, and the logs of testbeds, which name their weights."""
        module = ROOT / (str(settings["call"]).split(":")[0].removeprefix("prunelab.").replace(".", "/") + ".py")
        read = [path for path in sorted(module.parent.glob("*.csv")) if path.name != "reported.csv"]
        logs = [ROOT / "common/testbeds/weights" / name / "training.json" for name in settings.get("testbeds", ())]
        return tuple(str(path.relative_to(ROOT)) for path in (module, *read, *logs))

    @classmethod
    def metric(cls, name: str) -> Metric:
        return Metric(name)
