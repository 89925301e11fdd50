"""Top-1 accuracy of a classifier, its tokens pruned or not, with the MACs it really used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Classify(Task):
    """Accuracy and measured cost. On a GPU the model computes in bfloat16, and batches fit its memory."""

    name: ClassVar[str] = "classify"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    cost: ClassVar[str] = "gmacs"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "top1": Metric("top-1", "%", higher_is_better=True),
        "drop": Metric("points of top-1 lost to the unpruned model", higher_is_better=False),
        "gmacs": Metric("multiply-adds, the method's scoring included", "G", cost="MACs"),
        "scoring_gmacs": Metric("multiply-adds of the scoring", "G"),
        "saving": Metric("multiply-adds saved", "%", higher_is_better=True),
        "budget": Metric("what a matched budget came to"),
    }

    class Settings(base.Settings):
        """samples: images (all). against_dense: adds `drop`, against the unpruned model on the same images."""

        samples: PositiveInt | None = None
        against_dense: bool = False

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        samples = settings.samples or held
        return None if samples is None else Work(inputs=samples)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import classify

        return classify.measure(bench)
