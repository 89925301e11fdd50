"""Scores of BLIP, tuned for one task, or of CLIP, its weights pruned or not, and perhaps fine-tuned after that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import model_validator

from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from prunelab.common.tasks import base
from prunelab.common.tasks.base import SIZES, Catalogue, Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

LINES = {"cider": "CIDEr", "spice": "SPICE", "bleu4": "BLEU-4"}
_FOUND = {f"{what}_recall_{n}": Metric(f"{what}s found among the first {n}", "%", higher_is_better=True)
          for what in ("text", "image") for n in (1, 5, 10)}  # fmt: skip


class ImageText(Task):
    """What is asked follows from the data: BLIP finds texts by images and images by texts, writes captions (scored by
    pycocoevalcap, times a hundred, which takes a Java runtime), or says whether a sentence is true of two pictures;
    CLIP names classes, whose prompts are the means of their features."""

    name: ClassVar[str] = "image_text"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("paper",)
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "calibration"})
    named: ClassVar[Mapping[str, Catalogue]] = {"reader": "model"}
    cost: ClassVar[str] = "nonzero_gparameters"
    metrics: ClassVar[Mapping[str, Metric]] = {
        **_FOUND,
        **{key: Metric(f"{name} of captions", higher_is_better=True) for key, name in LINES.items()},
        "accuracy": Metric("sentences judged rightly", "%", higher_is_better=True),
        "top1": Metric("top-1", "%", higher_is_better=True),
        **SIZES,
    }

    class Settings(base.Settings):
        """samples: pictures, or pairs of them, of the test split (all). batch: that pass together. shortlist: of each
        search how many are compared one by one. beams, longest, shortest: of captions, in tokens. spice: whether their
        SPICE is told (whose parser pycocoevalcap fetches when it is first made). templates: how many of those
        published a class's name is put into. reader: a model of the catalogue whose tokenizer and image processor are
        used (the model's own). calibration: training pictures with a text each of `calibration_data` (the same data)
        to calibrate with, in calls of `together`. epochs, tuned, rate, decay: of a fine-tuning after pruning, by
        `tuned` samples a step, whose rate falls along a cosine. queue, momentum, soft: of that of retrieval: how many
        features are compared with, how slowly the second model that makes them follows, and its share of the
        target."""

        samples: PositiveInt | None = None
        batch: PositiveInt = 32
        shortlist: PositiveInt = 128
        beams: PositiveInt = 3
        longest: PositiveInt = 20
        shortest: NonNegativeInt = 5
        spice: bool = False
        templates: PositiveInt = 7
        reader: str | None = None
        calibration: NonNegativeInt = 128
        calibration_data: str | None = None
        together: PositiveInt = 1
        epochs: NonNegativeInt = 0
        tuned: PositiveInt = 32
        rate: PositiveFloat = 1e-5
        decay: NonNegativeFloat = 0.05
        queue: PositiveInt = 57600
        momentum: Share = 0.995
        soft: Share = 0.4

        @model_validator(mode="after")
        def _lengths(self) -> Self:
            if self.longest < self.shortest:
                raise ValueError(f"captions of at least {self.shortest} tokens are not of {self.longest} at most")
            return self

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import image_text

        return image_text.measure(bench)
