"""The detector that finds handwritten digits in scenes (`common.data.detection`), trained with Focus-DETR's parts.

A small DINO and the parts learn together, as in the paper: the parts' own loss is added to the detector's. Other than
there, each step draws how many tokens its encoder may update, and some steps update all, so that one model serves
every keep ratio and its unpruned runs are a fair baseline.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.backbones.dino import DINO, ConvPyramid
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.learned import PARTS
from prunelab.common.data import detection
from prunelab.common.metrics.average_precision import Detections, average_precision, detections
from prunelab.common.testbeds.base import Testbed
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

METHOD = "focus_detr"
QUICK, FULL, BATCH, TEST_SEED, TESTED = 100, 1000, 25, 1, 0.3


@dataclass(frozen=True)
class DigitsDetection(Testbed):
    """As deep in the encoder as Focus-DETR's R50, so that its cascade is the published one, and as narrow as the task
    allows: levels of 12 x 12, 6 x 6, 3 x 3 and 2 x 2 tokens.

    dense: share of the steps that update every token in every layer. least: smallest keep ratio; those of the other
    steps are drawn evenly on a logarithmic scale between it and 1. In short trials with ratios down to 0.05 and a
    backbone twice as wide it hardly mattered which tokens were kept; the two were not told apart. ramp: share of the
    training over which clutter grows from none to full contrast, so that digits are found early. limits: largest
    distance in pixels from a token to a side of its box, for each level; a quarter of the published ones, as scenes
    are smaller than photographs.
    """

    steps: int = 3500
    batch: int = 16
    rate: float = 1.5e-3
    decay: float = 1e-4
    check_every: int = 350
    width: int = 64
    heads: int = 4
    points: int = 2
    feedforward: int = 128
    encoder_layers: int = 6
    decoder_layers: int = 3
    queries: int = 30
    copies: int = 20
    channels: tuple[int, ...] = (16, 32, 64)
    dense: float = 0.2
    least: float = 0.3
    ramp: float = 0.3
    limits: tuple[float, ...] = (16, 32, 64)

    name: ClassVar[str] = "digits_detection"
    needs: ClassVar[tuple[str, ...]] = ("torch", "transformers", "scikit-learn", "faster-coco-eval")

    def build(self) -> nn.Module:
        side = detection.SIDE
        model = DINO(
            ConvPyramid(1, self.channels), self.channels, 10,
            width=self.width, heads=self.heads, points=self.points, feedforward=self.feedforward,
            encoder_layers=self.encoder_layers, decoder_layers=self.decoder_layers, queries=self.queries, groups=8,
            value="features", copies=self.copies, image_size=(side, side), image_channels=1,
        )  # fmt: skip
        parts = registry.create(METHOD).build(adapter_for(model).info)
        assert parts is not None
        model.add_module(PARTS, parts)
        return model

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        clutter = min(1.0, progress / self.ramp) if self.ramp else 1.0
        x, objects = detection.scenes("train", self.batch, generator, clutter, deformed=True)
        targets = [o.target() for o in objects]
        kind, level = torch.rand(2, generator=generator).tolist()
        pruned = kind >= self.dense
        with _pruned(model, math.exp(math.log(self.least) * level)) if pruned else nullcontext():
            total = model.loss(x, None, targets, generator)["total"]  # type: ignore[operator]
        if pruned:
            sizes = torch.full((len(x), 2), detection.SIDE)
            limits = [*zip((-1.0, *self.limits), (*self.limits, math.inf))]
            total = total + _supervision()(getattr(model, PARTS), targets, sizes, limits=limits)
        return total

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        count = QUICK if quick else FULL
        x, objects = detection.scenes("test", count, TEST_SEED)

        def precision() -> float:
            results: list[Detections] = []
            for part, shown in zip(x.split(BATCH), range(0, count, BATCH)):
                results += detections(model(part), objects[shown : shown + BATCH], range(10))
            return average_precision(objects, results)["AP"]

        dense = precision()
        with _pruned(model, TESTED):
            return {"ap": dense, f"ap_{TESTED}": precision(), "scenes": count}


def _pruned(model: nn.Module, ratio: float) -> AbstractContextManager[Any]:
    """The method at work on the model, with the parts that the model carries."""
    method = registry.create(METHOD)
    assert isinstance(method, TokenPruner)
    return applied(method, model, Budget(ratio))


def _supervision() -> Callable[..., Tensor]:
    """The loss of the method's parts. Found by the method's name: this package knows no method."""
    module = importlib.import_module(f"prunelab.methods.{registry.slug(registry.get(METHOD))}.supervision")
    return module.foreground_loss
