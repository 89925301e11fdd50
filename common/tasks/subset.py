"""A classifier trained on the samples that a data selector keeps, with or without a teacher trained on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Subset(Task):
    """Networks of one hidden layer classify handwritten digits. Scores are those of a network early in its training, or
    of one whole training; the teacher is as large as the student. All students train for as many steps."""

    name: ClassVar[str] = "subset"
    roles: ClassVar[tuple[str, ...]] = ("data_selector",)
    scales: ClassVar[tuple[str, ...]] = ("testbed",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"data"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "top1": Metric("top-1 accuracy of the students", "%", higher_is_better=True),
        "samples": Metric("samples trained on", "%", cost="samples trained on"),
        "fewest": Metric("samples kept of the class that kept fewest"),
    }

    class Settings(base.Settings):
        """alpha: weight of the teacher's term. temperature: of both. width: of the hidden layer. steps, batch, rate: of
        a student. early: steps before scores are taken. students: with different weights to start from, whose accuracy
        is averaged."""

        alpha: NonNegativeFloat = 0.0
        temperature: NonNegativeFloat = 4.0
        width: PositiveInt = 64
        steps: PositiveInt = 300
        batch: PositiveInt = 64
        rate: PositiveFloat = 3e-3
        early: NonNegativeInt = 20
        students: PositiveInt = 3

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import subset

        return subset.measure(bench)
