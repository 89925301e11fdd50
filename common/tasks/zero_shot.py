"""Scores of a language model, its weights, cache or tokens pruned or not, on the tasks of lm-evaluation-harness (the
extra `evaluation`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt
from prunelab.common.measures.scores import HARNESS_SHARES
from prunelab.common.tasks import base
from prunelab.common.tasks.base import OF_EXPERTS, SIZES, Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class ZeroShot(Task):
    """Metrics in percent, named as the harness names them: `boolq acc`, `gsm8k exact_match,strict-match`,
    `longbench_trec classification_score` and so on. What prunes caches or tokens acts while the model generates; tasks
    that only compare likelihoods use no cache."""

    name: ClassVar[str] = "zero_shot"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner", "cache_pruner", "token_pruner")
    by_role: ClassVar[Mapping[str, str]] = {"weight_pruner": "common/measures/perplexity.py"}
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "calibration", "own data"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "average": Metric("mean of the scores under `average`", "%", higher_is_better=True),
        "relative": Metric("the same mean as percent of `against`", "%", higher_is_better=True),
        **SIZES,
        **OF_EXPERTS,
    }

    class Settings(base.Questions, base.WithoutExperts):
        """tasks, shots, shots_of, limit, average: see `Questions`. against: the mean that the
        paper printed of the unpruned model. batch: asked together. length, calibration,
        calibration_data: of the calibration set, as in `perplexity`, and `experts` as there."""

        against: PositiveFloat | None = None
        batch: PositiveInt = 8
        length: PositiveInt | None = None
        calibration: NonNegativeInt = 32
        calibration_data: str | None = None

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import zero_shot

        return zero_shot.measure(bench)

    @classmethod
    def metric(cls, name: str) -> Metric:
        measure = name.partition(" ")[2].partition(",")[0]
        if measure in HARNESS_SHARES or measure.endswith("_score"):
            return Metric(name, "%", higher_is_better=True)
        return super().metric(name)
