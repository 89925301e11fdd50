"""SliceGPT (Ashkboos et al., ICLR 2024): rotate the residual stream to its principal components and delete the last.

Norms without gains commute with rotations, so that every sublayer can read and write the stream in a basis of its own:
the principal components of what calibration data put there. The trailing directions leave all matrices around it; what
passes a sublayer by is taken from one basis to the next by a small matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputAccumulator
from prunelab.common.weights.targets import Accumulator, Decision, Target, Unit, WeightSignals


def principal(moment: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Eigenvalues [D], largest first, and eigenvectors [D, D] as columns, of an uncentred second moment [D, D] with
    `damping` times its mean diagonal on the diagonal (section 3.3)."""
    damped = moment.clone()
    damped.diagonal().add_(damping * moment.diagonal().mean())
    values, vectors = torch.linalg.eigh(damped)
    return values.flip(0), vectors.flip(1)


def orientation(draws: Tensor, width: int) -> Tensor:
    """A rotation [D, D] of the first d directions among themselves, from draws [d, d]."""
    result = torch.eye(width, dtype=draws.dtype)
    result[: len(draws), : len(draws)] = torch.linalg.qr(draws).Q
    return result


def kept_directions(width: int, sparsity: float, interval: int) -> int:
    """(1 - sparsity) D, rounded down to a multiple of the interval."""
    kept = int((1 - sparsity) * width)
    return kept - kept % interval


class Moment(InputAccumulator):
    """The sum of x^T x over all tokens [D, D] in float64, of states without their mean where `centre`. It is symmetric:
    in strips from the diagonal to the right only little more than half of it is computed."""

    STRIPS: ClassVar[int] = 8

    def __init__(self, target: Target, centre: bool) -> None:
        super().__init__(target)
        self.centre = centre

    def take(self, x: Tensor) -> None:
        wide = x.double()
        wide = wide - wide.mean(-1, keepdim=True) if self.centre else wide
        width = wide.shape[1]
        self.state = self.state.to(wide) if self.state.ndim else wide.new_zeros(width, width)
        step = -(-width // self.STRIPS)
        for first in range(0, width, step):
            strip = slice(first, first + step)
            self.state[strip, first:].addmm_(wide[:, strip].T, wide[:, first:])

    def value(self) -> Tensor:
        return self.state.triu() + self.state.triu(1).T


@dataclass(frozen=True)
class SliceGPT(WeightPruner):
    """Slices the residual stream behind every sublayer (arXiv 2401.15024). The budget is the share of its directions
    that stays: 0.75 is the paper's slicing of 25 %.

    Parameters
    ----------
    interval
        Directions that stay are a multiple of it, rounded down.
    damping
        Of the second moments, times their mean diagonal; directions do not depend on it.
    orientation
        `random` mixes the directions that stay among themselves, which changes weights but not the model; `pca` leaves
        them by falling variance.
    slice_head
        Also cut what the last block gives to the head.
    centre
        As released, the embeddings lose their mean in all models, which changes those with RMS norms. False takes it
        out only where layer norms do so anyway.
    eps
        Of the norms; None keeps each model's own.
    slope, attention_slope, attention_offset
        How much more sparsity the last block has than the first, behind MLPs and behind attention (None is as MLPs),
        and what attention has beside it in the first: a linear schedule. Zero in the paper.
    """

    interval: PositiveInt = 8
    damping: NonNegativeFloat = 0.01
    orientation: Literal["random", "pca"] = "random"
    slice_head: bool = False
    centre: bool = True
    eps: PositiveFloat | None = 1e-5
    slope: FiniteFloat = 0.0
    attention_slope: FiniteFloat | None = None
    attention_offset: FiniteFloat = 0.0

    name: ClassVar[str] = "slicegpt"
    exempt = {
        "keep_all": "as released the mean of the embeddings leaves, and norms get an eps of their own",
        "budget": "what the last block gives to the head stays whole",
    }

    @property
    def units(self) -> Sequence[Unit]:
        return ("stream",)

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"moment": lambda target: Moment(target, self.centre and target.role == "input")}

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        last = max(target.block for target in targets)
        return [Budget(t.units - self.directions(t, budget, last), "removed") for t in targets]

    def directions(self, target: Target, budget: Budget, last: int) -> int:
        """How many stay behind a sublayer, of blocks 0 to `last`."""
        if (ends := target.role == "mlp" and target.block == last) and not self.slice_head:
            return target.units
        own = budget.at(target.block)
        share = own.amounts[0] if own.unit == "ratio" else 1 - own.pruned(target.units) / target.units
        place = target.block + (target.role == "mlp" and not ends)  # an MLP gives to the block behind it
        slope, start = self.slope, 1 - share
        if target.role == "attention":
            slope = self.slope if self.attention_slope is None else self.attention_slope
            start += self.attention_offset
        sparsity = start + slope * (place / last if last else 0)
        if not 0 <= sparsity < 1 or not (kept := kept_directions(target.units, sparsity, self.interval)):
            raise PrunelabError(
                f"slicegpt: {target.name} would have {sparsity:.0%} of its {target.units} directions sliced, rounded to"
                f" multiples of {self.interval}; keep more, or give a smaller interval or slope"
            )
        return kept

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """Directions by falling variance, as the basis has them."""
        return -torch.arange(target.units, dtype=torch.float32)

    def mask(self, target: Target, scores: Tensor, budget: Budget) -> Tensor:
        """The leading directions, whatever their scores."""
        return torch.arange(target.units) < target.units - budget.pruned(target.units)

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        mask = self.mask(target, self.score(target, signals), budget)
        basis = principal(signals["moment"], self.damping)[1][:, : int(mask.sum())]
        if self.orientation == "random":
            kept = basis.shape[1]
            draws = torch.rand(kept, kept, generator=signals.rng, dtype=basis.dtype)
            basis = basis @ orientation(draws, kept).to(basis.device)
        values = {"basis": basis}
        if target.role == "input":
            values |= {"centre": torch.ones(1)} if self.centre else {}
            values |= {} if self.eps is None else {"eps": torch.tensor(self.eps, dtype=torch.float64)}
        return Decision(mask, values)
