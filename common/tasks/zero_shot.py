"""Scores of a language model, its weights, cache, tokens or prompts pruned or not, on the tasks of
lm-evaluation-harness (the extra `evaluation`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt
from prunelab.common.measures.scores import HARNESS_PLAIN, HARNESS_SHARES
from prunelab.common.tasks import base
from prunelab.common.tasks.base import OF_EXPERTS, SIZES, Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

# Guesses to foretell time by: tokens of a question, its choices, and tokens of an answer where tasks have one written.
QUESTION, CHOICES = 128, 4
ANSWERS = {
    "gsm8k": 256,
    "minerva_math": 384,
    "humaneval": 256,
    "triviaqa": 16,
    "squad_completion": 16,
    "longbench": 64,
    "cnn_dailymail": 64,
}


class ZeroShot(Task):
    """Metrics in percent, named as the harness names them: `boolq acc`, `gsm8k exact_match,strict-match`,
    `longbench_trec classification_score` and so on. What prunes caches or tokens acts while the model generates; tasks
    that only compare likelihoods use no cache. A ranker of words shortens the context of prompts that have one apart
    from their question, by what the model itself expects."""

    name: ClassVar[str] = "zero_shot"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner", "cache_pruner", "token_pruner", "ranker")
    by_role: ClassVar[Mapping[str, str]] = {
        "weight_pruner": "common/measures/perplexity.py",
        "ranker": "common/measures/shortened.py",
    }
    scales: ClassVar[tuple[str, ...]] = ("real", "paper")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "calibration", "own data"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "average": Metric("mean of the scores under `average`", "%", higher_is_better=True),
        "relative": Metric("the same mean as percent of `against`", "%", higher_is_better=True),
        "computed": Metric("tokens of prompts that layers computed, those that came back included", "%"),
        **SIZES,
        **OF_EXPERTS,
    }

    class Settings(base.Questions, base.WithoutExperts):
        """tasks, shots, shots_of, limit, average: see `Questions`. against: the mean that the
        paper printed of the unpruned model. batch: asked together. dtype: in which all is asked, once
        pruned (that of the weights); sums are of float32. length, calibration,
        calibration_data: of the calibration set, as in `perplexity`, and `experts` as there."""

        against: PositiveFloat | None = None
        batch: PositiveInt = 8
        dtype: Literal["bfloat16", "float16"] | None = None
        length: PositiveInt | None = None
        calibration: NonNegativeInt = 32
        calibration_data: str | None = None

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """Four answers of a question are compared, or one is written."""
        counts = {task: n for task, count in sizes.items() if (n := settings.limit or count) is not None}
        if len(counts) < len(sizes):
            return None
        lengths = QUESTION * (1 + (settings.shots or 0))
        lines = {task: next((n for begin, n in ANSWERS.items() if task.startswith(begin)), 0) for task in counts}
        read = sum(count * (1 if lines[task] else CHOICES) for task, count in counts.items()) * lengths
        written = sum(lines[task] * count for task, count in counts.items())
        calibrated = settings.calibration * (settings.length or 2048)
        return Work(read=read + calibrated, written=written, together=settings.batch)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import zero_shot

        return zero_shot.measure(bench)

    @classmethod
    def metric(cls, name: str) -> Metric:
        measure = name.partition(" ")[2].partition(",")[0]
        if measure in HARNESS_SHARES or measure.endswith("_score"):
            return Metric(name, "%", higher_is_better=True)
        if measure in HARNESS_PLAIN:
            return Metric(name, higher_is_better=True)
        return super().metric(name)
