"""A language model fine-tuned on instructions, all of them or what a data selector keeps, by its scores on the tasks of
lm-evaluation-harness (the extra `evaluation`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt, Share
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work
from prunelab.common.tasks.zero_shot import ZeroShot

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

SAMPLE = 512  # tokens of an instruction with its answer: a guess to foretell time by


class Finetune(Task):
    """The data set is what the model is fine-tuned on; without a method it is trained on all of it, and with 0 epochs
    not at all. The service `history` is the model as it was. Metrics are named as under `zero_shot`."""

    name: ClassVar[str] = "finetune"
    roles: ClassVar[tuple[str, ...]] = ("data_selector",)
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "own data"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "average": Metric("mean of the scores under `average`", "%", higher_is_better=True),
        "samples": Metric("samples that entered the training", "%", cost="samples"),
        "tokens": Metric("tokens that entered the loss", "%", cost="tokens trained on"),
    }

    class Settings(base.Settings):
        """tasks, shots, limit, average: as in `zero_shot`. length: of a sample in tokens, prompt included. epochs: over
        what is kept, in steps of `batch` samples. rate, warmup: of the learning rate, which falls along a cosine. rank,
        alpha: of low-rank adapters (the extra `training`), which alone learn; rank 0 trains all weights. limited:
        instructions of the data set to choose from (all)."""

        tasks: tuple[str, ...]
        shots: NonNegativeInt | None = None
        limit: PositiveInt | None = None
        average: tuple[str, ...] = ()
        length: PositiveInt = 2048
        epochs: NonNegativeInt = 3
        batch: PositiveInt = 32
        rate: PositiveFloat = 1e-4
        warmup: Share = 0.0
        rank: NonNegativeInt = 8
        alpha: NonNegativeInt = 16
        limited: PositiveInt | None = None

    @classmethod
    def work(cls, settings: Any, asked: Mapping[str, int | None], held: int | None) -> Work | None:
        """The training, then what `zero_shot` asks."""
        samples = settings.limited or held
        scored = ZeroShot.work(
            ZeroShot.read({k: v for k, v in settings if k in ("tasks", "shots", "limit")}), asked, None
        )
        if samples is None or scored is None:
            return None
        return replace(scored, trained=settings.epochs * samples * SAMPLE, whole=not settings.rank)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import finetune

        return finetune.measure(bench)

    @classmethod
    def metric(cls, name: str) -> Metric:
        return super().metric(name) if name in cls.metrics else ZeroShot.metric(name)
