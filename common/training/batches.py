"""Batches for training: which samples a step reads is known from the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.examples import collate


@dataclass(frozen=True)
class Batches:
    """Samples in random order, epoch after epoch; every sample comes once before any comes twice.

    samples: token ids [N] each, or mappings of tensors (`input_ids`, `labels`, `pixel_values` ...).
    """

    samples: Sequence[Any]
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.samples):
            raise PrunelabError("there is no sample to train on; give at least one")
        if self.size < 1:
            raise PrunelabError(f"a batch cannot hold {self.size} samples; give 1 or more")

    def order(self, epoch: int) -> Tensor:
        """The order [n] of an epoch."""
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        return torch.randperm(len(self.samples), generator=rng)

    def indices(self, number: int) -> list[int]:
        """The samples [B] of the batch of that number."""
        chosen: list[int] = []
        while len(chosen) < self.size:
            place = number * self.size + len(chosen)
            epoch, start = divmod(place, len(self.samples))
            chosen += self.order(epoch)[start : start + self.size - len(chosen)].tolist()
        return chosen

    def __call__(self, number: int) -> dict[str, Tensor]:
        """The batch of that number."""
        return collate([self.samples[i] for i in self.indices(number)])
