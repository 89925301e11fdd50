"""Perplexity and next-token accuracy of a language model, its weights pruned or not, on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import field_validator

from prunelab.common.tasks import base
from prunelab.common.tasks.base import AtRunTime, Metric, Metrics, Reads, Task

SIZES: Mapping[str, Metric] = {
    "gparameters": Metric("parameters held", "G", cost="parameters"),
    "nonzero_gparameters": Metric("parameters that are not zero", "G", cost="nonzero parameters"),
    "saving": Metric("parameters gone", "%", higher_is_better=True),
    "nonzero_saving": Metric("parameters gone or zero", "%", higher_is_better=True),
    "weight_gbytes": Metric("bytes of weights, codes packed", "G", cost="bytes of weights"),
    "weight_saving": Metric("bytes of weights saved", "%", higher_is_better=True),
    "bits": Metric("bits of a prunable weight that is left, scales and zeros included", "bits", higher_is_better=False),
    "sparsity": Metric(
        "prunable parameters gone, zero, or what they were before fine-tuning", "%", higher_is_better=True
    ),
}

OF_EXPERTS: Mapping[str, Metric] = {
    "experts_run": Metric("choices of experts that ran", "%"),
    "activated_gparameters": Metric("parameters that a token uses", "G", cost="parameters a token uses"),
    "activated_saving": Metric("parameters that a token no longer uses", "%", higher_is_better=True),
}

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


def of_experts(given: AtRunTime | None) -> AtRunTime | None:
    """The setting `experts`, read."""
    if given is not None:
        given.admit("expert_pruner")
    return given


def expert_files(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The files that the setting `experts` brings."""
    given = settings.get("experts")
    return () if given is None else (AtRunTime.model_validate(given).file, "common/experts/apply.py")


class Perplexity(Task):
    """Each metric of the text comes with what it depends on in words (`protocol`, the unpruned model's value
    included)."""

    name: ClassVar[str] = "perplexity"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "calibration"})
    cost: ClassVar[str] = "nonzero_gparameters"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "perplexity": Metric("perplexity", higher_is_better=False),
        "loss": Metric("negative log likelihood", "nats a token", higher_is_better=False),
        "accuracy": Metric("next tokens right", "%", higher_is_better=True),
        "tokens": Metric("tokens predicted"),
        **SIZES,
        **OF_EXPERTS,
    }

    class Settings(base.Settings):
        """length: of the sequences in tokens, which the papers differ in and perplexity depends on. samples: how many
        of them (all). calibration: how many to calibrate with, of the same length, from `calibration_data` (the same
        data). experts: a method with options and budget that leaves out experts of tokens while the text is read."""

        length: int
        samples: int | None = None
        calibration: int = 32
        calibration_data: str | None = None
        experts: AtRunTime | None = None

        @field_validator("experts")
        @classmethod
        def _prunes_experts(cls, given: AtRunTime | None) -> AtRunTime | None:
            return of_experts(given)

    @classmethod
    def files(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return expert_files(settings)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import perplexity

        return perplexity.measure(bench)
