"""Time to the first token, speed of writing and memory of a language model, also of images or video, on a CUDA GPU: the
published architecture with random weights, since weights do not change the speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Prefill(Task):
    """Medians of 30 timed runs after warm-up, of one prompt of random content: with the encoder, and with the decisions
    of methods that prune tokens. Weights are pruned before: as many units leave as the budget says, see `size`. A
    ranker of words first shortens the prompt with the same model, sentence by sentence, within the time."""

    name: ClassVar[str] = "prefill"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner", "weight_pruner", "ranker")
    by_role: ClassVar[Mapping[str, str]] = {
        "weight_pruner": "common/measures/size.py",
        "ranker": "common/measures/shortened.py",
    }
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"architecture"})
    needs_gpu: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "ttft": Metric("time to the first token", "s", higher_is_better=False, timed=True),
        "ttft_ms": Metric("time to the first token", "ms", higher_is_better=False, timed=True),
        "decode": Metric("tokens a second behind the first", higher_is_better=True, timed=True),
        "token_ms": Metric("time of a token behind the first", "ms", higher_is_better=False, timed=True),
        "total": Metric("time of the whole answer", "s", higher_is_better=False, timed=True),
        "memory_gb": Metric("the most that the allocator held", "GB", higher_is_better=False, timed=True),
        "ttft_speedup": Metric(
            "speed of the first token against the unpruned model", higher_is_better=True, timed=True
        ),
        "total_speedup": Metric(
            "speed of the whole answer against the unpruned model", higher_is_better=True, timed=True
        ),
        "memory_mib": Metric("the most that the allocator held", "MiB", higher_is_better=False, timed=True),
        "decode_speedup": Metric("speed of writing against the unpruned model", higher_is_better=True, timed=True),
    }

    class Settings(base.Settings):
        """frames: of a video, else it is an image. text: tokens around it, or of a prompt
        of text alone, which must be named. new: tokens of the answer (64 are an
        assumption). against_dense: adds the ratios to the unpruned model."""

        frames: NonNegativeInt = 0
        text: NonNegativeInt | None = None
        new: PositiveInt = 64
        against_dense: bool = False

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        return Work(seconds=60)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import prefill

        return prefill.measure(bench)
