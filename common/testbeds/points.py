"""The networks of the toy experiments of "Pruning by Explaining", of the authors' size: classes of points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.data import points
from prunelab.common.testbeds.base import Testbed
from prunelab.common.training.recipe import MomentumRecipe


@dataclass(frozen=True)
class PointsCircle(MomentumRecipe, Testbed):
    """2 - 1000 - 1000 - 1000 - classes, with no nonlinearity behind the third hidden layer.

    The authors take 10,000 steps over all points at a rate of 0.001; here it is as much rate over shuffled parts of
    200, which comes to the same accuracies in a tenth of the time.
    """

    steps: int = 1000
    batch: int = 200
    rate: float = 0.01
    decay: float = 0.0
    clip: float = 1e9
    milestones: tuple[float, ...] = ()
    width: int = 1000

    name: ClassVar[str] = "points_circle"
    needs: ClassVar[tuple[str, ...]] = ("torch", "scikit-learn", "numpy")
    stored: ClassVar[torch.dtype] = torch.float16
    data: ClassVar[points.Set] = "circle"

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, self.width), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(self.width, self.width), nn.ReLU(),
            nn.Linear(self.width, self.width), nn.Linear(self.width, points.CLASSES[self.data]),
        )  # fmt: skip

    def chosen(self, progress: float, generator: torch.Generator) -> Tensor:
        """The points [B] of a step."""
        return torch.randperm(points.CLASSES[self.data] * points.PER_CLASS, generator=generator)[: self.batch]

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        x, y = points.training(self.data)
        rows = self.chosen(progress, generator)
        return F.cross_entropy(model(x[rows]), y[rows])

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        x, y = points.training(self.data)
        return {"accuracy": float((model(x).argmax(1) == y).float().mean()), "points": len(y)}


@dataclass(frozen=True)
class PointsMoon(PointsCircle):
    """The same on two half moons."""

    name: ClassVar[str] = "points_moon"
    data: ClassVar[points.Set] = "moon"


@dataclass(frozen=True)
class PointsMult(PointsCircle):
    """The same on four arms of a spiral, which the authors' training goes through class by class and never shuffles: it
    matters to what pruning does. So here every step reads random points of the next block of the file."""

    steps: int = 8000
    batch: int = 60
    rate: float = 0.025
    momentum: float = 0.5
    blocks: int = 8
    check_every: int = 1000
    save_every: int = 500

    name: ClassVar[str] = "points_mult"
    data: ClassVar[points.Set] = "mult"

    def chosen(self, progress: float, generator: torch.Generator) -> Tensor:
        size = points.CLASSES[self.data] * points.PER_CLASS // self.blocks
        block = round(progress * self.steps) % self.blocks
        return block * size + torch.randint(size, (self.batch,), generator=generator)
