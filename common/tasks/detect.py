"""Average precision of a detector, pruned or not, with the MACs its encoder and the whole of it used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Detect(Task):
    """Box precision with jackknife errors (sizes that do not occur are left out), and cost at the model's standard
    size."""

    name: ClassVar[str] = "detect"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    cost: ClassVar[str] = "encoder_gmacs"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "ap": Metric("AP", "%", higher_is_better=True),
        "ap50": Metric("at an overlap of a half", "%", higher_is_better=True),
        "ap75": Metric("at an overlap of three quarters", "%", higher_is_better=True),
        "aps": Metric("of small boxes", "%", higher_is_better=True),
        "apm": Metric("of medium boxes", "%", higher_is_better=True),
        "apl": Metric("of large boxes", "%", higher_is_better=True),
        "gmacs": Metric("multiply-adds, the method's scoring included", "G", cost="MACs"),
        "scoring_gmacs": Metric("multiply-adds of the scoring", "G"),
        "saving": Metric("multiply-adds saved", "%", higher_is_better=True),
        "encoder_gmacs": Metric("multiply-adds of the encoder", "G", cost="encoder MACs"),
        "encoder_saving": Metric("multiply-adds of the encoder saved", "%", higher_is_better=True),
        "scenes": Metric("scenes shown"),
        "budget": Metric("what a matched budget came to"),
    }

    class Settings(base.Settings):
        """samples: images (all). batch: images at a time; photographs are tested one by one unless it says
        otherwise, as some methods' scores depend on the padding. shown: a number of images adds `scenes`, with what
        was kept and found on each of them, for a picture. Testbed scenes alone are shown: most data sets forbid
        passing images on."""

        samples: PositiveInt | None = None
        batch: PositiveInt | None = None
        shown: NonNegativeInt = 0

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        samples = settings.samples or held
        return None if samples is None else Work(inputs=samples)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import detect

        return detect.measure(bench)
