"""Batches for training: which samples a step reads is known from the seed and the step alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.losses import IGNORED


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
        found: list[int] = []
        while len(found) < self.size:
            place = number * self.size + len(found)
            epoch, start = divmod(place, len(self.samples))
            found += self.order(epoch)[start : start + self.size - len(found)].tolist()
        return found

    def __call__(self, number: int) -> dict[str, Tensor]:
        """The batch of that number."""
        return collate([self.samples[i] for i in self.indices(number)])


def collate(samples: Sequence[Any]) -> dict[str, Tensor]:
    """One batch of samples. Token ids are padded on the right, and padding enters no loss; where samples bring no
    labels, a language model's are their tokens."""
    rows = [
        dict(sample) if isinstance(sample, Mapping) else {"input_ids": torch.as_tensor(sample)} for sample in samples
    ]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise PrunelabError("samples of one batch have different fields; give every sample the same")
    if "input_ids" not in rows[0]:
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    for row in rows:
        ids = row["input_ids"] = torch.as_tensor(row["input_ids"]).long()
        row.setdefault("attention_mask", torch.ones_like(ids))
        row.setdefault("labels", ids)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    length = max(len(row["input_ids"]) for row in rows)

    def joined(key: str) -> Tensor:
        tensors = [torch.as_tensor(row[key]) for row in rows]
        if tensors[0].shape[:1] != rows[0]["input_ids"].shape or key not in fill:
            return torch.stack(tensors)
        return torch.stack([torch.nn.functional.pad(t, (0, length - len(t)), value=fill[key]) for t in tensors])

    return {key: joined(key) for key in rows[0]}
