"""Tensors with unstructured zeros as bitmaps: one bit a number, and the nonzero numbers one behind the other.

The layout of Mustafar's kernels (Joo et al., 2025, section 4): tiles of 64 numbers, each with a 64-bit map and the
place where its numbers begin, so that a tile can be read without those before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 64


@dataclass(frozen=True)
class Bitmap:
    """maps: [T, 8] uint8, bit i of a tile's map set where number i is not zero. starts: [T] int32 places of the tiles
    in `numbers` [E], which keep their precision. shape: of the tensor."""

    maps: Tensor
    starts: Tensor
    numbers: Tensor
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, dense: Tensor) -> Bitmap:
        """The bitmap of a tensor, cut into tiles from its first number to its last. Every bit pattern but that of plain
        zero is kept: also -0, NaN and inf."""
        flat = dense.flatten()
        tiles = F.pad(flat, (0, -len(flat) % TILE)).view(-1, TILE)
        kept = (tiles != 0) | tiles.signbit()
        places = 1 << torch.arange(8, dtype=torch.uint8, device=dense.device)
        maps = (kept.view(-1, TILE // 8, 8) * places).sum(-1, dtype=torch.uint8)
        counts = kept.sum(-1)
        return cls(maps, (counts.cumsum(0) - counts).int(), tiles.masked_select(kept), tuple(dense.shape))

    def unpack(self) -> Tensor:
        """The tensor again, bit by bit."""
        bits = torch.arange(8, dtype=torch.uint8, device=self.maps.device)
        kept = (self.maps.unsqueeze(-1) >> bits & 1).bool().view(-1, TILE)
        tiles = self.numbers.new_zeros(kept.shape).masked_scatter_(kept, self.numbers)
        return tiles.flatten()[: math.prod(self.shape)].view(self.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return self.maps, self.starts, self.numbers
