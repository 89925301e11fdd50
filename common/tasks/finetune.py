"""A language model fine-tuned on instructions, all of them or what a data selector keeps, pruned before, after or while
it learns: by its scores on the tasks of lm-evaluation-harness (the extra `evaluation`) and its perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt, Share
from prunelab.common.tasks import base
from prunelab.common.tasks.base import SIZES, TRAINED, Catalogue, Metric, Metrics, Reads, Task, Work
from prunelab.common.tasks.zero_shot import ZeroShot

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

SAMPLE = 512  # tokens of an instruction with its answer: a guess to foretell time by


class Finetune(Task):
    """The data set is what the model is fine-tuned on; without a method it is trained on all of it, and with 0 epochs
    not at all. A method that prunes weights does so before or after the training, one that trains is the training. The
    services `history` and `teacher` are the model as it was, `reference` one that the setting of that name tells of.
    Metrics are named as under `zero_shot`."""

    name: ClassVar[str] = "finetune"
    roles: ClassVar[tuple[str, ...]] = ("data_selector", "weight_pruner", "training_method")
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "calibration", "own data"})
    named: ClassVar[Mapping[str, Catalogue]] = {
        "text": "dataset", "second_text": "dataset", "grader": "model", "second_grader": "model",
    }  # fmt: skip
    by_role: ClassVar[Mapping[str, str]] = {"training_method": "common/training/engine.py"}
    metrics: ClassVar[Mapping[str, Metric]] = {
        "average": Metric("mean of the scores under `average`", "%", higher_is_better=True),
        "gain": Metric("by how much that mean exceeds `against`, % of it", higher_is_better=True),
        "perplexity": Metric("perplexity of `text`", higher_is_better=False),
        "second_perplexity": Metric("perplexity of `second_text`", higher_is_better=False),
        "samples": Metric("samples that entered the training", "%", cost="samples"),
        "tokens": Metric("tokens that entered the loss", "%", cost="tokens trained on"),
        "memory_gb": Metric("the most that the allocator held", "GB", higher_is_better=False, timed=True),
        **SIZES,
        **TRAINED,
    }

    class Settings(base.Questions):
        """tasks, shots, shots_of, limit, average: as in `zero_shot`. length: of a sample in tokens, prompt included.
        epochs: over what is kept, in steps of `batch` samples, of which `together` pass through the model at once
        (all). rate, warmup: of the learning rate, which falls along a cosine. clip: the largest norm of a gradient.
        untie: whether embedding and output layer, where they are one parameter, are first made two. rank, alpha,
        dropout: of low-rank adapters (the extra `training`), which alone learn; rank 0 trains all weights. base_bits:
        of the weights below the factors of a method that trains with such, 8 or as they are (16). limited:
        instructions of the data set to choose from (all). reference: how many of them, drawn with the seed, the
        service `reference` is fine-tuned on before, by the same recipe. target: examples of each task that has a
        training split, to which the influence of instructions is measured. grader, second_grader: models that grade the
        instructions for methods that ask for it. order: whether weights are pruned before the
        training or after it. calibration, calibration_data, calibration_length: of the calibration set, as in
        `perplexity`; the data must be named. text, second_text: what perplexity is of, in sequences of `text_length`
        tokens. against: the mean that another training reached, over which this one's is a gain."""

        length: PositiveInt = 2048
        epochs: NonNegativeInt = 3
        batch: PositiveInt = 32
        together: PositiveInt | None = None
        rate: PositiveFloat = 1e-4
        warmup: Share = 0.0
        clip: PositiveFloat = 1.0
        untie: bool = False
        rank: NonNegativeInt = 8
        alpha: NonNegativeInt = 16
        dropout: Share = 0.0
        base_bits: Literal[8, 16] = 16
        limited: PositiveInt | None = None
        reference: PositiveInt | None = None
        target: PositiveInt | None = None
        grader: str | None = None
        second_grader: str | None = None
        order: Literal["prune, train", "train, prune"] = "prune, train"
        calibration: NonNegativeInt = 32
        calibration_data: str | None = None
        calibration_length: PositiveInt = 2048
        against: PositiveFloat | None = None
        text: str | None = None
        second_text: str | None = None
        text_length: PositiveInt = 2048

        @model_validator(mode="after")
        def _parts_are_equal(self) -> Self:
            if self.batch % (self.together or 1):
                raise ValueError(f"`together` divides `batch`; {self.together} does not divide {self.batch}")
            return self

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """The training, then what `zero_shot` asks."""
        samples = settings.limited or held
        scored = ZeroShot.work(
            ZeroShot.read({k: v for k, v in settings if k in ("tasks", "shots", "limit")}), sizes, None
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
