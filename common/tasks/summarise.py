"""ROUGE of the summaries that a method extracts from documents with references."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Summarise(Task):
    """Several references are averaged; words are not stemmed. A budget in bytes also cuts the summary there."""

    name: ClassVar[str] = "summarise"
    roles: ClassVar[tuple[str, ...]] = ("ranker",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"data"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "rouge1_recall": Metric("ROUGE-1 recall", "%", higher_is_better=True),
        "rouge1_f": Metric("ROUGE-1 F", "%", higher_is_better=True),
        "rouge2_recall": Metric("ROUGE-2 recall", "%", higher_is_better=True),
        "rouge2_f": Metric("ROUGE-2 F", "%", higher_is_better=True),
        "bytes": Metric("length of the summaries", "bytes"),
    }

    class Settings(base.Settings):
        """samples: documents (all)."""

        samples: PositiveInt | None = None

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import summarise

        return summarise.measure(bench)
