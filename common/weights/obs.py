"""Optimal brain surgery on one layer (LeCun et al., 1990; Hassibi et al., 1993), column by column as SparseGPT and GPTQ
do it: what is lost at one input channel, the channels behind it make up for.

Shapes: weight [R, C] of R outputs and C inputs; the Hessian [C, C] of half the squared error of the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import masks
from prunelab.common.weights.statistics import SecondMoment
from prunelab.common.weights.targets import Accumulator, Observation, Target


def inverse_factor(hessian: Tensor, damping: float, tries: int = 1) -> Tensor:
    """Upper Cholesky factor [C, C] of the inverse of the damped Hessian. Channels never used count as independent.
    tries: times that the damping is added before a Hessian counts as singular."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    damp = damping * diagonal.mean()
    for _ in range(tries):
        diagonal += damp
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not bool(failed) and bool(torch.isfinite(factor).all()):
            return factor
    raise PrunelabError("a Hessian is singular; give more calibration data or raise the damping")


def falling(diagonal: Tensor) -> Tensor:
    """The columns [C] by falling diagonal of the Hessian, the order in which GPTQ's `act-order` takes them. Channels
    never used count as 1, as in the factor."""
    return diagonal.masked_fill(diagonal == 0, 1).argsort(descending=True, stable=True)


def dead(diagonal: Tensor) -> Tensor:
    """Channels [C] that no calibration token used, where any token came: no evidence is none of zero."""
    return (diagonal == 0) & (diagonal != 0).any()


class Columns(Protocol):
    """What becomes of the columns of a weight, asked for from left to right. ahead: how many columns `settle` looks at,
    from one of a multiple of this number on; None where it may look at all of the block."""

    @property
    def ahead(self) -> int | None: ...

    def enter(self, columns: slice, weight: Tensor, diagonal: Tensor) -> None:
        """A block of columns is reached. weight [R, C] is as earlier blocks have left it; diagonal [width] is the
        inverse factor's at these columns."""

    def settle(self, column: int, block: Tensor, diagonal: Tensor, at: int) -> Tensor:
        """The final values [R] of a column, which stands at `at` of the block; what is right of it in the block is as
        the columns so far have left it."""


SMALL = 16  # columns that are at least taken together within a block


def sweep(weight: Tensor, factor: Tensor, width: int, columns: Columns, within: bool = True) -> Tensor:
    """The weight [R, C] after every column was settled and those behind it made up for the error (SparseGPT, algorithm
    1; GPTQ, algorithm 1).

    factor: from `inverse_factor`. Columns are updated lazily, in blocks of `width`, and within these in small ones as
    far as `columns` looks: a column is a rank-1 update in place, a small block a product. within: whether columns of a
    block make up for each other, too, and not for those of earlier blocks alone.
    """
    weight, total = weight.clone(), weight.shape[1]
    small = width if columns.ahead is None else -(-SMALL // columns.ahead) * columns.ahead
    for start in range(0, total, width):
        stop = min(start + width, total)
        turned, local = weight[:, start:stop].T.contiguous(), factor[start:stop, start:stop]
        block, errors, diagonal = turned.T, torch.empty_like(turned), local.diagonal()  # columns lie in one piece
        columns.enter(slice(start, stop), weight, diagonal)
        for i, (now, error, row) in enumerate(zip(turned.unbind(), errors.unbind(), local.unbind())):
            settled = columns.settle(start + i, block, diagonal, i)
            torch.sub(now, settled, out=error).div_(diagonal[i])
            first, last = i // small * small, min((i // small + 1) * small, stop - start)
            if within and i + 1 < last:
                turned[i + 1 : last].addr_(row[i + 1 : last], error, alpha=-1)
            now.copy_(settled)
            if within and i + 1 == last < stop - start:
                turned[last:].addmm_(local[first:last, last:].T, errors[first:last], alpha=-1)
        weight[:, start:stop] = block
        weight[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    return weight


@dataclass
class Pruned:
    """Columns of which some weights become zero (`kept` False). A ratio is met in each block over all of its rows, a
    pattern in each group of columns of a row, where the group is chosen when its first column is reached, on weights
    updated until then."""

    budget: Budget
    kept: Tensor

    @property
    def ahead(self) -> int:
        return self.budget.every if self.budget.unit == "pattern" else 1

    def enter(self, columns: slice, weight: Tensor, diagonal: Tensor) -> None:
        if self.budget.unit == "ratio":
            self._decide(columns, masks.per_matrix(weight[:, columns].square() / diagonal.square(), self.budget))

    def settle(self, column: int, block: Tensor, diagonal: Tensor, at: int) -> Tensor:
        if self.budget.unit == "pattern" and at % self.budget.every == 0:
            group = slice(at, at + self.budget.every)
            scores = block[:, group].square() / diagonal[group].square()
            self._decide(slice(column, column + self.budget.every), masks.per_row(scores, self.budget))
        return block[:, at].masked_fill(self._gone[column - self._first], 0)

    def _decide(self, columns: slice, kept: Tensor) -> None:
        self.kept[:, columns] = kept
        self._first, self._gone = columns.start, (~kept).T.contiguous()  # each column in one piece


def prune_matrix(weight: Tensor, factor: Tensor, budget: Budget, width: int) -> tuple[Tensor, Tensor]:
    """Mask and updated weight, both [out, in] (SparseGPT, algorithm 1), with columns taken in blocks of `width`."""
    pruned = Pruned(budget, torch.ones_like(weight, dtype=torch.bool))
    return pruned.kept, sweep(weight, factor, width, pruned)


class InverseFactor(SecondMoment):
    """The factor of the Hessian of a layer's inputs, made once for all layers that read them; ordered: with its columns
    in the order `falling`."""

    def __init__(self, target: Target, damping: float, tries: int = 1, ordered: bool = False) -> None:
        super().__init__(target)
        self.damping, self.tries, self.ordered = damping, tries, ordered

    def value(self) -> Tensor:
        hessian = self.state
        if self.ordered:
            order = falling(hessian.diagonal())
            hessian = hessian[order][:, order]
        return inverse_factor(hessian, self.damping, self.tries)


class Diagonal(Accumulator):
    """The diagonal [C] of the Hessian that another accumulator gathers."""

    shared: ClassVar[bool] = True

    def __init__(self, of: SecondMoment) -> None:
        self.of = of

    def update(self, observed: Observation) -> None:
        """The other one takes it in."""

    def value(self) -> Tensor:
        return self.of.state.diagonal().clone()


def factors(make: Callable[[Target], InverseFactor]) -> dict[str, Callable[[Target], Accumulator]]:
    """The statistics `factor` and `diagonal` of one Hessian, for `WeightPruner.statistics`."""
    made: dict[str, InverseFactor] = {}

    def factor(target: Target) -> InverseFactor:
        if target.name not in made:
            made[target.name] = make(target)
        return made[target.name]

    return {"factor": factor, "diagonal": lambda target: Diagonal(factor(target))}


def inverse_factors(damping: float) -> Callable[[Target], InverseFactor]:
    """A factory of such factors, for `WeightPruner.statistics`."""
    return lambda target: InverseFactor(target, damping)
