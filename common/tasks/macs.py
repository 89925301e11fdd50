"""Exact cost of a method on an architecture, counted on the meta device: no weights, no data, no scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Status, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Macs(Task):
    """Cost of one image. Methods whose counts depend on the input have no such cost: their MACs are measured on
    data."""

    name: ClassVar[str] = "macs"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    scales: ClassVar[tuple[str, ...]] = ()
    status: ClassVar[Status] = "analytic"
    reads: ClassVar[frozenset[Reads]] = frozenset({"architecture"})
    cost: ClassVar[str] = "macs"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "macs": Metric("MACs", "G", higher_is_better=False, cost="MACs"),
        "scoring": Metric("multiply-adds of the scoring", "G"),
        "dense": Metric("multiply-adds of the unpruned model", "G"),
        "saving": Metric("multiply-adds saved", "%", higher_is_better=True),
        "fvcore": Metric(
            "the count of the papers' tool: without scoring, 5 a LayerNorm element", "G", higher_is_better=False
        ),
        "blocks": Metric("fvcore's without the patch embedding", "G", higher_is_better=False),
        "module_macs": Metric(
            "multiply-adds of the module, the scoring included", "G", higher_is_better=False, cost="MACs of the module"
        ),
        "module_dense": Metric("multiply-adds of the unpruned module", "G"),
        "module_saving": Metric("multiply-adds of the module saved", "%", higher_is_better=True),
    }
    count: ClassVar[tuple[str, ...]] = ("macs", "scoring")

    class Settings(base.Settings):
        """size: height and width of the image. module: path of the submodule in which the method works, which adds its
        cost alone with the scoring."""

        size: tuple[PositiveInt, PositiveInt] | None = None
        module: str | None = None

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import macs

        return macs.measure(bench)
