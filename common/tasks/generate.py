"""Images that a text-to-image model makes of captions, its weights pruned or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveInt
from prunelab.common.tasks import base
from prunelab.common.tasks.base import SIZES, Catalogue, Metric, Metrics, Reads, Task

if TYPE_CHECKING:
    from prunelab.common.measures.bench import Bench


class Generate(Task):
    """At the paper's scale by a pipeline of diffusers against the captions' own images: Fréchet distance of Inception's
    features, and cosine of CLIP's features of image and caption. The testbed's digits have pixels as features, and
    instead of CLIP a recogniser, which names the digit asked for or not."""

    name: ClassVar[str] = "generate"
    roles: ClassVar[tuple[str, ...]] = ("weight_pruner",)
    scales: ClassVar[tuple[str, ...]] = ("testbed", "paper")
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "data", "calibration"})
    named: ClassVar[Mapping[str, Catalogue]] = {"inception": "model", "clip": "model"}
    cost: ClassVar[str] = "nonzero_gparameters"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "fid": Metric("Fréchet distance", higher_is_better=False),
        "clip_score": Metric("CLIP score", "cosine", higher_is_better=True),
        "right": Metric("digits that are what was asked for", "%", higher_is_better=True),
        **SIZES,
    }

    class Settings(base.Settings):
        """samples: captions, of each of which one image is made. batch: images at a time. steps, guidance: of the
        sampler (None: the pipeline's own). calibration: captions of `calibration_data` (the same data) to calibrate
        with. inception, clip: the catalogue's names of the networks whose features are compared."""

        samples: PositiveInt
        batch: PositiveInt = 16
        steps: PositiveInt | None = None
        guidance: NonNegativeFloat | None = None
        calibration: NonNegativeInt = 128
        calibration_data: str | None = None
        inception: str | None = None
        clip: str | None = None

    def measure(self, bench: Bench[Any]) -> Metrics:
        from prunelab.common.measures import generate

        return generate.measure(bench)
