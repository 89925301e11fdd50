"""Speculative decoding of prompts: mean accepted tokens, steps saved, and wall clock against plain greedy decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import field_validator

from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveInt, PositiveShare
from prunelab.common.tasks import base
from prunelab.common.tasks.base import AtRunTime, Catalogue, Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

PROMPTS = 480  # of Spec-Bench, to foretell time by


class Decode(Task):
    """Without a method the option `decoding` names a baseline: `plain` (if left out), `prompt_lookup`, `assistant`."""

    name: ClassVar[str] = "decode"
    roles: ClassVar[tuple[str, ...]] = ("draft_decoder",)
    scales: ClassVar[tuple[str, ...]] = ("testbed", "real", "assets", "paper")
    budgeted: ClassVar[bool] = False
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data"})
    named: ClassVar[Mapping[str, Catalogue]] = {"draft": "model", "heads": "model", "store": "dataset"}
    metrics: ClassVar[Mapping[str, Metric]] = {
        "mat": Metric("MAT, tokens a step", higher_is_better=True),
        "steps": Metric("verification steps", higher_is_better=False),
        "steps_saved": Metric("steps saved", "%", higher_is_better=True),
        "tokens_per_second": Metric("tokens a second", higher_is_better=True, timed=True),
        "ms_per_token": Metric("milliseconds a token", "ms", higher_is_better=False, timed=True),
        "speedup": Metric("wall-clock ratio", higher_is_better=True, timed=True),
        "drafting": Metric("time spent on drafts and learning", "%", higher_is_better=False, timed=True),
        "identical": Metric("prompts answered word for word as plain decoding does", "%", higher_is_better=True),
        "tokens": Metric("tokens written"),
    }

    class Settings(base.Settings):
        """new: tokens at most. prompt: tokens of a text to go on from. samples: prompts (all). task: of Spec-Bench.
        warmup: how often the first prompt is answered before the clock runs (the method learns from these, too). draft:
        the catalogue's name of the model that methods and baselines may ask for. cut: a method that prunes the weights
        of this model first, with options and budget, where no smaller one has the target's tokens. heads, store: those
        of a method's learned parts, and of the texts that it retrieves from. temperature, top_p: of sampling, which
        also the plain decoding that speeds are compared with then does; 0 is greedy."""

        new: PositiveInt = 128
        prompt: NonNegativeInt = 64
        samples: PositiveInt | None = None
        task: str | None = None
        warmup: NonNegativeInt = 3
        draft: str | None = None
        cut: AtRunTime | None = None
        heads: str | None = None
        store: str | None = None
        temperature: NonNegativeFloat = 0.0
        top_p: PositiveShare = 1.0

        @field_validator("cut")
        @classmethod
        def _prunes_weights(cls, given: AtRunTime | None) -> AtRunTime | None:
            if given is not None:
                given.admit("weight_pruner")
            return given

    @classmethod
    def files(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        if settings.get("cut") is None:
            return ()
        return (AtRunTime.model_validate(settings["cut"]).file, "common/weights/pruning.py")

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """Prompts are answered plainly as well, to compare the clocks."""
        prompts = settings.samples or held or PROMPTS
        return Work(written=2 * settings.new * prompts)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import decode

        return decode.measure(bench)
