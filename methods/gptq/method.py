"""GPTQ (Frantar et al., ICLR 2023): weights become whole numbers column by column, and the columns not yet rounded make
up for the error.

The grid of a row, or of a group of its columns, is uniform between the least and the largest weight, zero included.
With the upper Cholesky factor U of the inverse Hessian H = 2 X X^T of a layer's inputs, the error (w - q) / U_ii of
column i times U[i, i:] is taken from the columns behind it. RTN is the same grid without compensation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare
from prunelab.common.weights.obs import InverseFactor, dead, factors, falling
from prunelab.common.weights.quantisation import Quantiser, gptq, rounded
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Decision, Target, Unit, WeightSignals


@dataclass(frozen=True)
class Rtn(WeightPruner):
    """Every weight becomes the nearest point of its grid (the baseline of arXiv 2210.17323).

    Parameters
    ----------
    group
        Columns of a row that share a grid; 0 for whole rows.
    symmetric
        Grids as wide below zero as above.
    search
        Shrink each grid to where its error is least; `steps`, `shrink` and `power` are those of the search.
    sign
        One bit is a sign times the mean magnitude (MC-MoE's grid); otherwise it has two levels as released.
    """

    group: NonNegativeInt = 0
    symmetric: bool = False
    search: bool = False
    steps: PositiveInt = 100
    shrink: PositiveShare = 0.8
    power: PositiveFloat = 2.4
    sign: bool = False

    name: ClassVar[str] = "rtn"
    quantises = True
    exempt = {"keep_all": "no number of bits is the identity", "budget": "weights become codes, and all stay"}

    def quantiser(self, budget: Budget) -> Quantiser:
        """The grids under a budget of whole bits."""
        bits = int(budget.amounts[0])
        return Quantiser(bits, self.symmetric, self.group, self.search, self.steps, self.shrink, self.power, self.sign)

    def score(self, target: Target, signals: WeightSignals) -> torch.Tensor:
        """|w|: what rounding may err by grows with it."""
        return signals.weight.float().abs()

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        everything = torch.ones(target.shape, dtype=torch.bool)
        return Decision(everything, code=rounded(signals.weight, self.quantiser(budget)))


@dataclass(frozen=True)
class Gptq(Rtn):
    """Rounds column by column under compensation (ICLR 2023, arXiv 2210.17323).

    Parameters
    ----------
    group, symmetric, search, steps, shrink, power, sign
        Of the grids, see `Rtn`.
    act_order
        Take the columns by falling diagonal of the Hessian.
    static_groups
        Grids of groups are those of the original weights; otherwise each is laid on the way.
    grids
        When a group's grid is laid on the way: at the `block` of columns in which it begins, as released, or at its
        first `column`, over what compensation has made of it.
    true_sequential
        Linears of a layer that read different inputs are rounded one after the other, each measured behind the others.
    damping
        Share of the Hessian's mean diagonal added to it, up to `tries` times until it can be factored.
    width
        Columns updated lazily together.
    within
        Columns of such a block make up for each other, too; MC-MoE's code leaves that out up to three bits.
    sparse
        Weights that are zero stay zero, such as those that 2:4 pruning took before; others make up for their part, too.
    """

    act_order: bool = False
    static_groups: bool = False
    grids: Literal["block", "column"] = "block"
    true_sequential: bool = False
    damping: NonNegativeFloat = 0.01
    tries: PositiveInt = 1
    width: PositiveInt = 128
    within: bool = True
    sparse: bool = False

    name: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse and self.sign:
            raise PrunelabError("a grid of signs has no zero; leave `sign` or `sparse` out")

    @property
    def in_turn(self) -> bool:
        return self.true_sequential

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return factors(lambda target: InverseFactor(target, self.damping, self.tries, self.act_order))

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        diagonal = signals["diagonal"]
        code = gptq(
            signals.weight,
            signals["factor"],
            self.quantiser(budget),
            self.width,
            falling(diagonal) if self.act_order else None,
            dead=dead(diagonal),
            static=self.static_groups,
            updated=self.grids == "column",
            within=self.within,
            gone=signals.weight == 0 if self.sparse else None,
        )
        return Decision(torch.ones(target.shape, dtype=torch.bool), code=code)
