"""Problems that a language model, pruned or not, solves in words of its own, which are sampled and graded by rule: the
mean over several runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from prunelab.common.tasks import base
from prunelab.common.tasks.base import SIZES, Catalogue, Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

QUESTION, ANSWER = 256, 8192  # tokens: guesses to foretell time by


class Solve(Task):
    """An answer is right where the last boxed part of it is, or where its program passes all tests, which is run for it
    (`common.data.problems`). A model may run programs on its way to an answer (`calls`). Methods that calibrate do so
    on problems with the model's own answers."""

    name: ClassVar[str] = "solve"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    by_role: ClassVar[Mapping[str, str]] = {"weight_pruner": "common/weights/pruning.py"}
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "calibration"})
    named: ClassVar[Mapping[str, Catalogue]] = dict.fromkeys(
        (*(f"calibration_{n}" for n in range(2, 6)), *(f"data_{n}" for n in range(2, 8))), "dataset"
    )
    metrics: ClassVar[Mapping[str, Metric]] = {
        "solved": Metric("problems solved", "%", higher_is_better=True),
        "written": Metric("tokens of an answer", "tokens"),
        "unfinished": Metric("answers that were cut off", "%", higher_is_better=False),
        **SIZES,
    }

    class Settings(base.Settings):
        """samples: of the problems (all). runs: over all of them, each with draws of its own. new: most tokens of an
        answer. temperature, top_p: of the sampling; temperature 0 takes the likeliest. batch: answered together.
        calibration: problems to calibrate on, drawn of calibration_data, and as many of each of calibration_2,
        calibration_3, calibration_4 and calibration_5. shown: what of them a method sees, the problem with the model's
        own answer, either alone, or the problem with the answer of the data. length: of the sequences where
        calibration_data are plain text.
        data_2, data_3, data_4, data_5, data_6 and data_7: more sets of problems, over whose shares of solved ones the
        mean goes. calls: how often the model may have its last program run (ToRA, arXiv 2309.17452): what the program
        prints is put behind it, up to `shown_most` characters of it, and the model goes on, by up to `new` tokens each
        time. template: how a problem is put, with `{problem}` in its place (the model's own template)."""

        samples: PositiveInt | None = None
        runs: PositiveInt = 1
        new: PositiveInt = 32768
        temperature: NonNegativeFloat = 0.6
        top_p: Share = 0.95
        batch: PositiveInt = 8
        calibration: NonNegativeInt = 25
        calibration_data: str | None = None
        calibration_2: str | None = None
        calibration_3: str | None = None
        calibration_4: str | None = None
        calibration_5: str | None = None
        shown: Literal["both", "problem", "answer", "reference"] = "both"
        length: PositiveInt = 4096
        data_2: str | None = None
        data_3: str | None = None
        data_4: str | None = None
        data_5: str | None = None
        data_6: str | None = None
        data_7: str | None = None
        calls: NonNegativeInt = 0
        shown_most: PositiveInt = 100
        template: str = Field("", pattern=r"^(?s:.*\{problem\}.*)?$")

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """Every problem is answered in every run, and those to calibrate on once."""
        count = settings.samples or held
        if count is None:
            return None
        total = count * settings.runs + settings.calibration
        return Work(read=QUESTION * total, written=min(ANSWER, settings.new) * total, together=settings.batch)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import solve

        return solve.measure(bench)
