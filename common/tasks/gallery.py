"""Which tokens a method removes, stage by stage, on the testbed's own scenes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Gallery(Task):
    """For each scene its label, the answers before and after, the image, and the patches kept at each site. Real images
    never enter a record: most data sets forbid passing them on."""

    name: ClassVar[str] = "gallery"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("testbed",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "scenes": Metric("scenes shown"),
        "budget": Metric("what a matched budget came to"),
    }

    class Settings(base.Settings):
        """samples: scenes."""

        samples: PositiveInt

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import gallery

        return gallery.measure(bench)
