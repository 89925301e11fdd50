"""Which layers of a language model a method takes out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Layers(Task):
    """Layers by their number, counted from 0: `layer 2 of 9` is the second that leaves, counted through the model, of
    nine; `rank 2` the second in the order in which they leave as the budget shrinks. The data set is what is calibrated
    with."""

    name: ClassVar[str] = "layers"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "calibration"})
    metrics: ClassVar[Mapping[str, Metric]] = {"layers": Metric("layers that leave")}

    class Settings(base.Settings):
        """length, calibration, calibration_data: of the calibration set, as in `perplexity`."""

        length: PositiveInt
        calibration: NonNegativeInt = 32
        calibration_data: str | None = None

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        return Work(read=settings.calibration * settings.length)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import layers

        return layers.measure(bench)

    @classmethod
    def metric(cls, name: str) -> Metric:
        if re.fullmatch(r"layer [1-9]\d* of [1-9]\d*|rank [1-9]\d*", name):
            return Metric("number of the layer")
        return super().metric(name)
