"""Segmentation quality of a network, pruned or not, with the MACs it really used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Segment(Task):
    """Quality over all pixels; costs are means over all windows, since they differ from window to window. How real
    images are cut up belongs to the model: `windows` in its catalogue entry holds `stride`, `bound` and `norm`."""

    name: ClassVar[str] = "segment"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("testbed", "paper")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    cost: ClassVar[str] = "gmacs"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "miou": Metric("mIoU", "%", higher_is_better=True),
        "accuracy": Metric("pixels right", "%", higher_is_better=True),
        "gmacs": Metric("multiply-adds, the method's scoring included", "G", cost="MACs"),
        "scoring_gmacs": Metric("multiply-adds of the scoring", "G"),
        "saving": Metric("multiply-adds saved", "%", higher_is_better=True),
        "tokens": Metric("share of tokens behind the last site"),
        "scenes": Metric("scenes shown"),
        "budget": Metric("what a matched budget came to"),
    }

    class Settings(base.Settings):
        """samples: images (all). presence: see `Segmenter`. gallery: a number of the testbed's scenes of which `scenes`
        tells what left where."""

        samples: PositiveInt | None = None
        presence: Literal["last", "exit"] = "last"
        gallery: NonNegativeInt = 0

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        samples = settings.samples or held
        return None if samples is None else Work(inputs=samples)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import segment

        return segment.measure(bench)
