"""How far what a method keeps of a language model depends on how much it is calibrated with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from prunelab.common.core.options import NonNegativeFloat, PositiveInt, Share
from prunelab.common.tasks import base
from prunelab.common.tasks.base import Metric, Metrics, Reads, Task, Work
from prunelab.common.tasks.solve import ANSWER, QUESTION

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Agreement(Task):
    """Structures (experts, heads, channels or layers) that a method keeps by few samples and by many of one set, of
    which the few are the first, under one budget: the share that both keep."""

    name: ClassVar[str] = "agreement"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "calibration"})
    metrics: ClassVar[Mapping[str, Metric]] = {
        "overlap": Metric("what is kept by the few and by the many, of what is kept", "%", higher_is_better=True),
        "least": Metric("the same in the target where it is least", "%", higher_is_better=True),
    }

    class Settings(base.Settings):
        """calibration: the few samples, many: the many, drawn of calibration_data. shown, length, new, temperature,
        top_p, batch, template: how they are made, as in `solve`."""

        calibration: PositiveInt
        many: PositiveInt
        calibration_data: str | None = None
        shown: Literal["both", "problem", "answer", "reference"] = "both"
        length: PositiveInt = 4096
        new: PositiveInt = 32768
        temperature: NonNegativeFloat = 0.6
        top_p: Share = 0.95
        batch: PositiveInt = 8
        template: str = Field("", pattern=r"^(?s:.*\{problem\}.*)?$")

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """The many are written once; both are read."""
        read = (QUESTION + min(ANSWER, settings.new)) * (settings.calibration + settings.many)
        return Work(read=read, written=min(ANSWER, settings.new) * settings.many, together=settings.batch)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import agreement

        return agreement.measure(bench)
