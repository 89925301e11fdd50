"""Top-1 accuracy of a classifier whose weights are pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import SIZES, Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class ClassifyWeights(Task):
    """Accuracy, and what became of the weights. Batch norms keep their statistics."""

    name: ClassVar[str] = "classify_weights"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("assets", "paper")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "calibration"})
    cost: ClassVar[str] = "nonzero_gparameters"
    metrics: ClassVar[Mapping[str, Metric]] = {"top1": Metric("top-1", "%", higher_is_better=True), **SIZES}

    class Settings(base.Settings):
        """samples: images (all). calibration: training images of `calibration_data` (the same data) to
        calibrate with, where the method measures anything."""

        samples: PositiveInt | None = None
        calibration: NonNegativeInt = 128
        calibration_data: str | None = None

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import classify_weights

        return classify_weights.measure(bench)
