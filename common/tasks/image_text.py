"""Scores of BLIP, tuned for one task, or of CLIP, its weights pruned or not, and perhaps fine-tuned after that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import SIZES, Catalogue, Metric, Metrics, Reads, Task, Work

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench

TEXT = 35  # tokens of a text, to foretell time by
LINES = {"cider": "CIDEr", "spice": "SPICE", "bleu4": "BLEU-4"}
_FOUND = {f"{what}_recall_{n}": Metric(f"{what}s found among the first {n}", "%", higher_is_better=True)
          for what in ("text", "image") for n in (1, 5, 10)}  # fmt: skip


class ImageText(Task):
    """What is asked follows from the data: BLIP finds texts by images and images by texts, writes captions (scored by
    pycocoevalcap, times a hundred), or says whether a sentence is true of two pictures; CLIP names classes, whose
    prompts are the means of their features."""

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
        SPICE is told (a program in Java, which pycocoevalcap fetches at its first use). templates: how many of those
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
        momentum: PositiveFloat = 0.995
        soft: NonNegativeFloat = 0.4

    @classmethod
    def work(cls, settings: Any, sizes: Mapping[str, int | None], held: int | None) -> Work | None:
        """Every picture once, with a caption written to it."""
        samples = settings.samples or held
        if samples is None or settings.epochs:
            return None
        return Work(inputs=samples, written=samples * TEXT, together=settings.batch)

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import image_text

        return image_text.measure(bench)
