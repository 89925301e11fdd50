"""What a testbed is: a small model that we trained ourselves, with its data, its loss and its test.

A testbed is a frozen dataclass whose fields are its recipe. `prunelab.common.training.trainer.fit` trains it into a
folder of its own: a checkpoint while it runs, `model.safetensors` and `training.json` when it is done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.training.recipe import Recipe


@dataclass(frozen=True)
class Testbed(Recipe, ABC):
    """A small model that we trained ourselves, on data that ships inside our dependencies."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("torch",)  # distributions whose versions belong in the log
    stored: ClassVar[torch.dtype | None] = None  # in which its weights are stored, None for their own

    @abstractmethod
    def build(self) -> nn.Module:
        """The model with initial weights drawn from torch's global generator."""

    @abstractmethod
    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        """Mean loss (a scalar) of one fresh batch. progress runs from 0 to 1 over the training."""

    @abstractmethod
    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Quality of a model in eval mode on held-out data, and on how many samples; `quick` for the curve."""

    def settle(self, model: nn.Module) -> None:
        """Once it is trained, before it is tested and stored: decide what the trained model alone can tell."""

    def extras(self) -> Mapping[str, str]:
        """Further text files that belong to the trained model, by name: a language model's tokenizer."""
        return {}
