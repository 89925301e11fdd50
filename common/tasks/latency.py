"""Throughput of the published architecture with random weights on a CUDA GPU: weights do not change the speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Latency(Task):
    """Medians of 30 timed batches after warm-up in bfloat16."""

    name: ClassVar[str] = "latency"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"architecture"})
    needs_gpu: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "images_per_second": Metric("images a second", higher_is_better=True, timed=True),
        "speedup": Metric("speed against the unpruned model", higher_is_better=True, timed=True),
        "memory_gib": Metric("the most that the allocator held", "GiB", higher_is_better=False, timed=True),
        "batch": Metric("images a batch", timed=True),
        "budget": Metric("what a matched budget came to", timed=True),
    }

    class Settings(base.Settings):
        """batch: images at most, halved until the memory holds them. against_dense: adds `speedup`, against the
        unpruned model on the same batch."""

        batch: PositiveInt = 256
        against_dense: bool = False

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        return Work(seconds=60)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import latency

        return latency.measure(bench)
