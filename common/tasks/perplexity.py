"""Perplexity and next-token accuracy of a language model, its weights pruned or not, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import OF_EXPERTS, SIZES, Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

TEXT = 350_000  # tokens of a test text such as WikiText-2's: a guess to foretell time by


class Perplexity(Task):
    """Each metric of the text comes with what it depends on in words (`protocol`, the unpruned model's value
    included)."""

    name: ClassVar[str] = "perplexity"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("testbed", "real", "assets", "paper")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "calibration"})
    cost: ClassVar[str] = "nonzero_gparameters"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "perplexity": Metric("perplexity", higher_is_better=False),
        "loss": Metric("negative log likelihood", "nats a token", higher_is_better=False),
        "accuracy": Metric("next tokens right", "%", higher_is_better=True),
        "tokens": Metric("tokens predicted"),
        "seconds": Metric("time of reading the text", "s", higher_is_better=False, timed=True),
        **SIZES,
        **OF_EXPERTS,
    }

    class Settings(base.WithoutExperts):
        """length: of the sequences in tokens, which the papers differ in and perplexity depends on. samples: how many
        of them (all). calibration: how many to calibrate with, of the same length, from `calibration_data` (the same
        data). experts: as in `WithoutExperts`."""

        length: PositiveInt
        samples: PositiveInt | None = None
        calibration: NonNegativeInt = 32
        calibration_data: str | None = None

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        measured = settings.samples * settings.length if settings.samples else TEXT
        return Work(read=measured + settings.calibration * settings.length)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import perplexity

        return perplexity.measure(bench)
