"""An encoder fine-tuned on each task of GLUE, and scored on its development set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from prunelab.common.core.options import PositiveFloat, PositiveInt, Share
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Catalogue, Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

Name = Literal["mnli", "qnli", "qqp", "rte", "sst2", "mrpc", "cola", "stsb"]
TRAINED: Mapping[str, int] = {
    "mnli": 392702, "qnli": 104743, "qqp": 363846, "rte": 2490, "sst2": 67349, "mrpc": 3668, "cola": 8551, "stsb": 5749,
}  # fmt: skip


class Glue(Task):
    """All weights learn, with a new head, and the epoch counts whose loss on the development set is lowest. Scores are
    accuracies in percent, of CoLA a hundredfold Matthews correlation, of STS-B a hundredfold rank correlation."""

    name: ClassVar[str] = "glue"
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    named: ClassVar[Mapping[str, Catalogue]] = {"tokenizer": "model"}
    metrics: ClassVar[Mapping[str, Metric]] = {
        **{name: Metric(f"{name}, development set, %", higher_is_better=True) for name in TRAINED},
        "average": Metric("mean over the tasks, %", higher_is_better=True),
    }

    class Settings(base.Settings):
        """tasks: of GLUE. begun: tasks whose training begins with the weights that MNLI's ended with. tokenizer: a
        model of the catalogue whose tokenizer reads (the model's own). length: of an input in tokens. epochs, batch,
        rate, warmup, decay, clip: of the training, whose rate falls in a line; batch_of, rate_of: of tasks that have
        another. runs: trainings with draws of their own, of whose scores the median counts."""

        tasks: tuple[Name, ...] = ("mnli", "qnli", "qqp", "rte", "sst2", "mrpc", "cola", "stsb")
        begun: tuple[Name, ...] = ()
        tokenizer: str | None = None
        length: PositiveInt = 128
        epochs: PositiveInt = 10
        batch: PositiveInt = 32
        rate: PositiveFloat = 1e-5
        warmup: Share = 0.06
        decay: Share = 0.1
        clip: PositiveFloat = 1.0
        batch_of: Mapping[Name, PositiveInt] = {}
        rate_of: Mapping[Name, PositiveFloat] = {}
        runs: PositiveInt = 5

        @model_validator(mode="after")
        def _begins_where_something_ended(self) -> Self:
            if self.begun and (self.tasks[:1] != ("mnli",) or not {*self.begun} < {*self.tasks}):
                raise ValueError("`begun` names tasks of `tasks`, of which MNLI is then the first and not one of them")
            return self

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """Every sample of every task in every epoch and run, at the full length."""
        count = sum(TRAINED[task] for task in settings.tasks) * settings.epochs * settings.runs
        return Work(trained=count * settings.length, whole=True)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import glue

        return glue.measure(bench)
