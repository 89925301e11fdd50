"""Weights as whole numbers: grids, nearest rounding, and GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), which lets
the columns not yet rounded make up for the error of those that are.

Shapes: weight [R, C]; grids [R, 1] or one a group of columns [R, G].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.obs import sweep
from prunelab.common.weights.targets import Quantised

MOST = 8  # bits of a code


@dataclass(frozen=True)
class Quantiser:
    """How a grid of whole numbers is laid over the values of a row.

    Parameters
    ----------
    bits : int
        Bits of a code, 1 to 8. One bit is a sign times the mean magnitude.
    symmetric : bool
        The grid is as wide below zero as above, for rows that have a negative value.
    group : int
        Consecutive columns that share a grid; 0 for whole rows.
    search : bool
        Shrink the range to where the error |q - x|^2.4 of the row is least (`steps` shares down to 1 - `shrink`).
    """

    bits: int
    symmetric: bool = False
    group: int = 0
    search: bool = False
    steps: int = 100
    shrink: float = 0.8
    power: float = 2.4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST or self.bits != int(self.bits) or self.group < 0:
            raise PrunelabError(f"codes have 1 to {MOST} whole bits and groups 0 or more columns, not {self}")

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [R, 1] for the values [R, n]. Zero is on every grid; that of a row of zeros is [-1, 1]'s."""
        x = x.float()
        if self.bits == 1:
            scale = 2 * x.abs().mean(-1, keepdim=True)
            return scale, torch.full_like(scale, 0.5)
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(low.abs(), high)
            low = torch.where(low < 0, -high, low)
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        best = self._laid(low, high)
        return self._searched(x, low, high, best) if self.search else best

    def _laid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        top = 2**self.bits - 1
        scale = (high - low) / top
        zero = torch.full_like(scale, (top + 1) / 2) if self.symmetric else (-low / scale).round()
        return scale, zero

    def _searched(self, x: Tensor, low: Tensor, high: Tensor, best: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        least = torch.full_like(low, torch.inf)
        for step in range(int(self.shrink * self.steps)):
            share = 1 - step / self.steps
            scale, zero = self._laid(share * low, share * high)
            rounded = scale * (self.codes(x, scale, zero) - zero)
            error = (rounded - x).abs().pow_(self.power).sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        return best

    def codes(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes of values, still as floating-point numbers; halves round to even."""
        if self.bits == 1:
            return (x >= 0).to(scale.dtype)
        return ((x / scale).round() + zero).clamp(0, 2**self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns of a group."""
        return self.group or columns


def rounded(weight: Tensor, quantiser: Quantiser) -> Quantised:
    """Nearest rounding (RTN)."""
    weight, width = weight.float(), quantiser.width(weight.shape[1])
    groups = weight.split(width, 1)
    grids = [quantiser.grid(group) for group in groups]
    codes = torch.cat([quantiser.codes(g, *grid) for g, grid in zip(groups, grids, strict=True)], 1)
    scale, zero = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    return Quantised(codes.to(torch.uint8), scale, zero, quantiser.bits, width, quantiser.symmetric)


@dataclass
class _Rounding:
    """Columns on their way to codes. As published, the grid of a group is laid when the block of columns in which it
    begins is reached, over the weights as earlier blocks have left them, unless it is given."""

    quantiser: Quantiser
    codes: Tensor
    scale: Tensor
    zero: Tensor
    fixed: Tensor | None = None  # group of each column, where the grids are laid beforehand
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.quantiser.width(self.codes.shape[1])

    def enter(self, columns: slice, weight: Tensor, diagonal: Tensor) -> None:
        if self.fixed is None:
            for start in range(-(-columns.start // self.width) * self.width, columns.stop, self.width):
                at = slice(start // self.width, start // self.width + 1)
                self.scale[:, at], self.zero[:, at] = self.quantiser.grid(weight[:, start : start + self.width])

    def settle(self, column: int, block: Tensor, diagonal: Tensor, at: int) -> Tensor:
        group = column // self.width if self.fixed is None else self.fixed[column]
        scale, zero = self.scale[:, group], self.zero[:, group]
        codes = self.codes[:, column] = self.quantiser.codes(block[:, at], scale, zero)
        return scale * (codes - zero)


def gptq(
    weight: Tensor, factor: Tensor, quantiser: Quantiser, width: int = 128, order: Tensor | None = None
) -> Quantised:
    """Rounding column by column under compensation.

    factor [C, C]: from `prunelab.common.weights.obs.inverse_factor`; columns are updated lazily, in blocks of `width`.
    order [C]: the columns are taken in this order, and the factor is that of the Hessian in it (`act-order`); grids are
    then laid beforehand over the groups of the original columns. Columns that no input uses must be zero.
    """
    weight = weight.float()
    start = rounded(weight, quantiser)
    scale, zero = start.scale.clone(), start.zero.clone()
    if order is None:
        columns = _Rounding(quantiser, torch.zeros_like(weight), scale, zero)
        sweep(weight, factor, width, columns)
        codes = columns.codes
    else:
        columns = _Rounding(quantiser, torch.zeros_like(weight), scale, zero, order // start.group)
        sweep(weight[:, order], factor, width, columns)
        codes = columns.codes[:, order.argsort()]
    return Quantised(codes.to(torch.uint8), scale, zero, quantiser.bits, start.group, quantiser.symmetric)
