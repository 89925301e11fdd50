"""Exact cost of a prompt to an image or video language model, counted on the meta device: no weights, no data, no
scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Status, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class PromptMacs(Task):
    """Cost and cache of a prompt with one image or video. What a method decides by values is counted as for a video
    that repeats nothing and whose frames matter alike."""

    name: ClassVar[str] = "prompt_macs"
    roles: ClassVar[tuple[str, ...]] = ("token_pruner",)
    scales: ClassVar[tuple[str, ...]] = ()
    status: ClassVar[Status] = "analytic"
    reads: ClassVar[frozenset[Reads]] = frozenset({"architecture"})
    cost: ClassVar[str] = "scoring_macs"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "macs": Metric("multiply-adds of encoder and decoder", "G", higher_is_better=False),
        "encoder_macs": Metric("multiply-adds of the encoder with its projector", "G"),
        "decoder_macs": Metric("prefill of the decoder", "GMACs", higher_is_better=False, cost="MACs of the decoder"),
        "scoring_macs": Metric("multiply-adds of the method's decisions", "G", cost="MACs of the decision in it"),
        "saving": Metric("multiply-adds saved", "%", higher_is_better=True),
        "decoder_saving": Metric("multiply-adds of the decoder saved", "%", higher_is_better=True),
        "cache_mib": Metric("key-value cache", "MiB", higher_is_better=False),
        "cache_saving": Metric("cache saved", "%", higher_is_better=True),
    }
    count: ClassVar[tuple[str, ...]] = ("decoder_macs", "scoring_macs", "cache_mib")

    class Settings(base.Settings):
        """text: tokens of the prompt that are not visual. frames: of a video, else it is an image."""

        text: NonNegativeInt | None = None
        frames: NonNegativeInt = 0

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import prompt_macs

        return prompt_macs.measure(bench)
