"""Weights as whole numbers: grids, nearest rounding, and GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323), which lets
the columns not yet rounded make up for the error of those that are.

Shapes: weight [R, C]; grids [R, 1] or one a group of columns [R, G].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
        Bits of a code, 1 to 8.
    symmetric : bool
        The grid is as wide below zero as above, for rows that have a negative value.
    group : int
        Consecutive columns that share a grid; 0 for whole rows.
    search : bool
        Shrink the range to where the error |q - x|^`power` of the row is least (`steps` shares down to 1 - `shrink`).
    sign : bool
        One bit is a sign times the mean magnitude; otherwise it has the two levels of any other grid.
    centred : bool
        A symmetric grid of 2^(b-1) - 1 steps up to the greatest magnitude, and one step further down (QuaRot's), for
        all rows, in place of 2^b - 1 steps over the whole range (GPTQ's).
    """

    bits: int
    symmetric: bool = False
    group: int = 0
    search: bool = False
    steps: int = 100
    shrink: float = 0.8
    power: float = 2.4
    sign: bool = True
    centred: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST or self.bits != int(self.bits) or self.group < 0:
            raise PrunelabError(f"codes have 1 to {MOST} whole bits and groups 0 or more columns, not {self}")
        if self.steps < 1 or not 0 < self.shrink <= 1 or self.power <= 0:
            raise PrunelabError(f"a grid is searched in 1 or more steps, down by a share above 0 to 1, not as {self}")
        if self.centred and (not self.symmetric or self.bits < 2):
            raise PrunelabError("a centred grid is symmetric and has 2 or more bits")

    @property
    def signs(self) -> bool:
        """Whether codes are signs."""
        return self.bits == 1 and self.sign

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [R, 1] for the values [R, n]. Zero is on every grid; that of a row of zeros is [-1, 1]'s."""
        x = x.float()
        if self.signs:
            scale = 2 * x.abs().mean(-1, keepdim=True)
            return scale, torch.full_like(scale, 0.5)
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        if self.centred:
            high = torch.maximum(low.abs(), high).clamp_min(1e-5)
            low = -high
        elif self.symmetric:
            high = torch.maximum(low.abs(), high)
            low = torch.where(low < 0, -high, low)
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        best = self._laid(low, high)
        return self._searched(x, low, high, best) if self.search else best

    def _laid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        top = 2**self.bits - 1
        if self.centred:
            return high / (top // 2), torch.full_like(high, top // 2 + 1)
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
        if self.signs:
            return (x >= 0).to(scale.dtype)
        return ((x / scale).round() + zero).clamp(0, 2**self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns of a group."""
        return self.group or columns


def grids(weight: Tensor, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    """Scales and zeros [R, G] of the groups of a weight's columns."""
    results = [quantiser.grid(group) for group in weight.float().split(quantiser.width(weight.shape[1]), 1)]
    scale, zero = (torch.cat(parts, 1) for parts in zip(*results, strict=True))
    return scale, zero


def rounded(weight: Tensor, quantiser: Quantiser) -> Quantised:
    """Nearest rounding (RTN)."""
    (scale, zero), width = grids(weight, quantiser), quantiser.width(weight.shape[1])
    group = torch.arange(weight.shape[1], device=weight.device) // width
    codes = quantiser.codes(weight.float(), scale[:, group], zero[:, group])
    return Quantised(codes.to(torch.uint8), scale, zero, quantiser.bits, width, quantiser.symmetric)


class Rounding:
    """Columns on their way to codes.

    scale, zero [R, G] are filled where they are not `laid` beforehand: as published, when the block of columns is
    reached in which a group begins, over the weights as earlier blocks have left them; `updated`: when the group's
    first column is reached, over the weights as all earlier columns have left them, those of later blocks excepted.
    gone [R, C]: weights that become zero whatever compensation has made of them.
    """

    ahead: ClassVar[int | None] = None

    def __init__(
        self,
        quantiser: Quantiser,
        scale: Tensor,
        zero: Tensor,
        group: Tensor,
        laid: bool,
        updated: bool,
        gone: Tensor | None = None,
    ) -> None:
        self.quantiser, self.scale, self.zero = quantiser, scale, zero
        self.group, self.laid, self.updated, self.gone = group, laid, updated, gone
        self.width = quantiser.width(len(group))
        self.codes = scale.new_zeros(len(group), len(scale)).T  # columns lie in one piece
        self.weight = self.codes
        self.at_column: tuple[Tensor, Tensor] = (scale, zero)  # of the columns [R, width] of the block at hand

    def lay(self, start: int, weight: Tensor) -> None:
        """The grid of the group that begins at a column."""
        at = start // self.width
        scale, zero = self.quantiser.grid(weight)
        self.scale[:, at : at + 1], self.zero[:, at : at + 1] = scale, zero

    def enter(self, columns: slice, weight: Tensor, diagonal: Tensor) -> None:
        if not self.laid:
            for start in range(-(-columns.start // self.width) * self.width, columns.stop, self.width):
                self.lay(start, weight[:, start : start + self.width])
        self.weight = weight[:, columns.stop :]
        self.look(columns)

    def look(self, columns: slice) -> None:
        """Grids of the columns of a block."""
        group = self.group[columns]
        self.at_column = self.scale.T[group].T, self.zero.T[group].T

    def settle(self, column: int, block: Tensor, diagonal: Tensor, at: int) -> Tensor:
        if self.updated and not self.laid and column % self.width == 0:
            here = block[:, at : at + self.width]
            self.lay(column, torch.cat([here, self.weight[:, : self.width - here.shape[1]]], 1))
            self.look(slice(column - at, column - at + block.shape[1]))
        scale, zero = (part[:, at] for part in self.at_column)
        codes = self.quantiser.codes(block[:, at], scale, zero)
        codes = codes if self.gone is None else torch.where(self.gone[:, column], zero, codes)
        self.codes[:, column] = codes
        return scale * (codes - zero)


def gptq(
    weight: Tensor,
    factor: Tensor,
    quantiser: Quantiser,
    width: int = 128,
    order: Tensor | None = None,
    *,
    dead: Tensor | None = None,
    static: bool = False,
    updated: bool = False,
    within: bool = True,
    gone: Tensor | None = None,
) -> Quantised:
    """Rounding column by column under compensation (algorithm 1).

    factor [C, C]: from `prunelab.common.weights.obs.inverse_factor`; columns are updated lazily, in blocks of `width`.
    order [C]: the columns are taken in this order, and the factor is that of the Hessian in it (`act-order`). dead [C]:
    channels that no input uses, which become zero after the grids of whole rows are laid. static: grids of groups are
    laid beforehand, over the groups of the original columns; otherwise on the way (see `Rounding`), of columns in the
    order they are taken. within: see `sweep`. gone [R, C]: weights that become zero, for which others make up too.
    """
    weight, columns = weight.float(), weight.shape[1]
    alive = weight if dead is None else weight.masked_fill(dead, 0)
    laid, size = static or not quantiser.group, quantiser.width(columns)
    scale, zero = grids(alive if quantiser.group else weight, quantiser)
    place = torch.arange(columns, device=weight.device)
    group = (place if order is None or not static else order) // size
    gone = gone if gone is None or order is None else gone[:, order]
    rounding = Rounding(quantiser, scale, zero, group, laid, updated, gone)
    sweep(alive if order is None else alive[:, order], factor, width, rounding, within)
    codes, index = rounding.codes.contiguous(), None
    if order is not None:
        back = order.argsort()
        codes, index = codes[:, back], None if laid else group[back].int()
    return Quantised(
        codes.to(torch.uint8), rounding.scale, rounding.zero, quantiser.bits, size, quantiser.symmetric, index
    )


def proxy_loss(weight: Tensor, dense: Tensor, factor: Tensor) -> float:
    """Half the squared error of a layer's outputs, damping included, that the solver has made in its rounded weight
    [R, C]: sum (w - q)^2 / U_ii^2 / 2 over the columns as they were reached."""
    wide = (weight.double() - dense.double()).T
    errors = torch.linalg.solve_triangular(factor.double().T, wide, upper=False)
    return float(errors.square().sum() / 2)
