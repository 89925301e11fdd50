"""Parameters and MACs of a language model before and after structured pruning, on the meta device: from its
configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Status, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Size(Task):
    """A method is here by how many units it leaves, which for uniform methods the budget decides: which units does not
    matter to a size. Methods that let data decide how many are refused."""

    name: ClassVar[str] = "size"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    scales: ClassVar[tuple[str, ...]] = ()
    status: ClassVar[Status] = "analytic"
    reads: ClassVar[frozenset[Reads]] = frozenset({"architecture"})
    cost: ClassVar[str] = "gmacs"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "gparameters": Metric("parameters", "G", higher_is_better=False),
        "gmacs": Metric("multiply-adds of a forward pass", "G", higher_is_better=False, cost="MACs of 128 tokens"),
        "dense_gparameters": Metric("parameters of the unpruned model", "G"),
        "dense_gmacs": Metric("multiply-adds of the unpruned model", "G"),
        "parameters_saving": Metric("parameters saved", "%", higher_is_better=True),
        "saving": Metric("multiply-adds saved", "%", higher_is_better=True),
    }

    class Settings(base.Settings):
        """length: of the text in tokens."""

        length: PositiveInt = 128

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import size

        return size.measure(bench)
