"""What pruning leaves of a testbed's pictures and videos, frame by frame, with the answers before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Looks(Task):
    """For each question its words, the answers, the frames, and what is left of each patch at each site. Real images
    never enter a record: most data sets forbid passing them on."""

    name: ClassVar[str] = "looks"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("testbed",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "looks": Metric("questions shown"),
        "budget": Metric("what a matched budget came to"),
    }

    class Settings(base.Settings):
        """samples: questions."""

        samples: PositiveInt

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import looks

        return looks.measure(bench)
