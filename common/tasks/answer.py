"""Questions with an answer of one word, to an image or video language model whose visual tokens are pruned or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Answer(Task):
    """What such a model still answers, what is kept, and what that costs."""

    name: ClassVar[str] = "answer"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("testbed",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    cost: ClassVar[str] = "gmacs"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("answers right", "%", higher_is_better=True),
        "kept": Metric("visual tokens that a layer sees, in the mean over layers", "%"),
        "gmacs": Metric("multiply-adds, the method's scoring included", "G", cost="MACs"),
        "scoring_gmacs": Metric("multiply-adds of the scoring", "G"),
        "saving": Metric("multiply-adds saved", "%", higher_is_better=True),
        "cache_gbytes": Metric("the decoder's cache", "GB"),
        "cache_saving": Metric("cache saved", "%", higher_is_better=True),
        "budget": Metric("what a matched budget came to"),
        "oracle": Metric("answers right under some budget", "%", higher_is_better=True),
        "oracle_budget": Metric(
            "the least budget that answers right, in the mean", higher_is_better=False, cost="tokens"
        ),
    }

    class Settings(base.Settings):
        """samples: questions. match: the budget is the share of the visual tokens to be `kept`, whatever the method
        means by its own, or the nearest to it that the method can go to. blind: no model is asked, but the best guess
        from the words of each question alone. frame_scores: how the frames of a video are weighed for a method that
        asks for it: by the attention of a pass of the unpruned model, which is in none of the metrics. oracle: budgets
        that rise to the run's own; each question then also counts under the least that answers it right."""

        samples: PositiveInt
        match: bool = False
        blind: bool = False
        frame_scores: Literal["attention"] | None = None
        oracle: tuple[str, ...] = ()

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import answer

        return answer.measure(bench)
