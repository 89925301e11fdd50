"""LLM-Pruner (Ma et al., NeurIPS 2023): remove coupled groups of weights that the loss hardly depends on.

A head is the rows of its queries, keys and values with the columns of the output projection that read it; a neuron of
an MLP is its gate and up rows with its down column. What is computed for every weight, how much the loss changes
without it, is summed over the group: along each member's other axis, and then over the members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Probe, Statistics, Target, Unit, WeightSignals

Criterion = Literal["param_first", "param_second", "param_mix", "vectorize", "l1", "l2", "random"]
Reduction = Literal["sum", "mean", "max", "prod", "first", "second"]

MEMBERS: Mapping[Unit, tuple[str, ...]] = {"heads": ("q", "o", "v", "k"), "channels": ("gate", "up", "down")}
READERS = ("o", "down")  # members whose columns are the group's, not their rows
SECOND_ORDER = ("param_second", "param_mix")
PIECE = 2**18  # weights at once


def salience(criterion: Criterion, weight: Tensor, gradient: Tensor, squares: Tensor | None = None) -> Tensor:
    """How much the loss changes without each weight (Eq. 5), to second order with the mean squared gradient of single
    samples for the Hessian's diagonal (Eq. 6 and 7); all of the weight's shape."""
    if squares is None:
        return weight * gradient
    curvature = weight * squares * weight
    return curvature if criterion == "param_second" else weight * gradient - curvature / 2


def member_importance(
    criterion: Criterion, axis: int, weight: Tensor, gradient: Tensor | None = None, squares: Tensor | None = None
) -> Tensor:
    """Importance [C] of a member's rows (axis 0) or columns (1), from the salience of its weights; for the norms, which
    need no gradient, from the weights themselves. `vectorize` lets changes of unlike sign cancel. Rows are taken in
    pieces that a CPU's cache holds."""
    rows = max(1, PIECE // weight.shape[1])
    parts = []
    for first in range(0, len(weight), rows):
        piece = weight[first : first + rows].float()
        if gradient is None:
            piece = piece.square() if criterion == "l2" else piece.abs()
        else:
            known = None if squares is None else squares[first : first + rows]
            piece = salience(criterion, piece, gradient[first : first + rows].float(), known)
            piece = piece if criterion == "vectorize" else piece.abs_()
        parts.append(piece.sum(1 - axis))
    if len(parts) == 1:
        return parts[0].abs() if criterion == "vectorize" else parts[0]
    total = torch.cat(parts) if axis == 0 else torch.stack(parts).sum(0)
    return total.abs() if criterion == "vectorize" else total


def folded(importance: Tensor, channels: int, units: int, released: bool = True) -> Tensor:
    """A member's importance on the channels [C] of the shortest one: with grouped queries several query heads share a
    key-value head. As released query head h goes to key-value head h modulo their number, otherwise to its own."""
    if released:
        return importance.view(-1, channels).sum(0)
    return importance.view(units, -1, channels // units).sum(1).flatten()


def group_importance(members: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """Importance [C] of coupled channels from that of the members [C] of their groups."""
    if reduction in ("first", "second"):
        return members[("first", "second").index(reduction)]
    stacked = torch.stack(list(members))
    if reduction == "max":
        return stacked.amax(0)
    return stacked.prod(0) if reduction == "prod" else stacked.sum(0) if reduction == "sum" else stacked.mean(0)


def removed(available: int, keep: float) -> int:
    """Channels that leave, in the floats of the released code, which can make it one more than expected."""
    return available - int(available * keep)


class Squares(Accumulator):
    """Squared gradients of single samples over their number, summed; of the weight's shape."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.state = torch.zeros(())

    def update(self, observed: Tensor) -> None:
        self.state = self.state.to(observed.device) + observed.float().square() / self.samples

    def value(self) -> Tensor:
        return self.state


class Importance(Accumulator):
    """A member's importance [C], taken from the whole gradient as soon as it is there, so that none is kept."""

    def __init__(self, criterion: Criterion, role: str, weight: Tensor, squares: Tensor | None) -> None:
        self.criterion, self.axis = criterion, int(role in READERS)
        self.weight, self.squares = weight, squares
        self.state = torch.zeros(())

    def update(self, observed: Tensor) -> None:
        self.state = member_importance(self.criterion, self.axis, self.weight, observed, self.squares)

    def value(self) -> Tensor:
        return self.state


@dataclass(frozen=True)
class LLMPruner(WeightPruner):
    """Structured pruning of heads and MLP neurons by gradients of the language-modelling loss (arXiv 2305.11627).

    The budget is the share of units that stays: of every block in range, or of all of them together.

    Parameters
    ----------
    criterion
        `param_first`: first-order Taylor, weight by weight (the paper's Element1, and what the authors' scripts run).
        `param_second`: the second-order term. `param_mix`: both (Element2). `vectorize`: first order, summed before the
        absolute value (Vector). `l1`, `l2`: sums of powers of the weights. `random`: by lot.
    reduction
        Of the members of a group; None is `sum`, and `mean` for the norms.
    scope
        `block` takes the same share of every block, `global` compares the heads and neurons of all.
    attention_blocks, mlp_blocks
        Blocks (first, behind the last) whose heads and neurons are pruned; None is all. The authors spare the first
        four and last two of 32: (4, 30).
    released
        As the authors' code has it, importances of query heads are added to the wrong key-value heads where queries
        are grouped (`folded`). False adds them to their own.
    mode
        `block` takes heads and neurons, `channel` the channels of the residual stream, in all that reads or writes it.
    """

    criterion: Criterion = "param_first"
    reduction: Reduction | None = None
    scope: Literal["block", "global"] = "block"
    attention_blocks: tuple[NonNegativeInt, NonNegativeInt] | None = None
    mlp_blocks: tuple[NonNegativeInt, NonNegativeInt] | None = None
    released: bool = True
    mode: Literal["block", "channel"] = "block"

    name: ClassVar[str] = "llm_pruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        for blocks in (self.attention_blocks, self.mlp_blocks):
            if blocks is not None and blocks[0] > blocks[1]:
                raise PrunelabError(f"llm_pruner: {blocks} is no range of blocks; give (first, behind the last)")

    @property
    def sequential(self) -> bool:
        return False  # gradients are those of the dense model

    @property
    def units(self) -> Sequence[Unit]:
        return ("hidden",) if self.mode == "channel" else ("heads", "channels")

    def covers(self, target: Target) -> bool:
        if target.unit == "hidden":
            return True
        blocks = self.attention_blocks if target.unit == "heads" else self.mlp_blocks
        return blocks is None or blocks[0] <= target.block < blocks[1]

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """The importance of every member's channels."""
        if self.criterion in ("l1", "l2", "random"):
            return {}
        squares: Mapping[str, Statistics] = {}
        if self.criterion in SECOND_ORDER:
            squares = probe.gradients({"squares": lambda member: Squares(len(probe.samples))})

        def importance(member: Target) -> Accumulator:
            known = squares.get(member.name, {}).get(f"squares.{member.role}")
            return Importance(self.criterion, member.role, probe.weights(member)[member.role], known)

        return probe.gradients({"importance": importance}, together=True)

    def members(self, target: Target, signals: WeightSignals) -> list[Tensor]:
        """Importance [C] of each member's channels, in the order in which the authors' graph finds the members."""
        roles = [role for role in MEMBERS.get(target.unit, tuple(signals.weights)) if role in signals.weights]
        if self.criterion in ("l1", "l2"):
            norms = {role: signals.weights[role] for role in roles}
            results = [member_importance(self.criterion, int(role in READERS), norms[role]) for role in roles]
        else:
            results = [signals[f"importance.{role}"] for role in roles]
        if target.unit == "hidden":
            return results
        channels = min(len(member) for member in results)
        return [folded(member, channels, target.units, self.released) for member in results]

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        if self.criterion == "random":
            return torch.rand(target.shape, generator=signals.rng)
        reduction = self.reduction or ("mean" if self.criterion in ("l1", "l2") else "sum")
        channels = group_importance(self.members(target, signals), reduction)
        return channels.view(target.units, -1).sum(1)

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        if budget.unit != "ratio":
            return super().select(targets, signals, scores, budget)
        if self.scope == "global":
            return self._together(targets, scores, budget)
        results = []
        for target, seen, score in zip(targets, signals, scores, strict=True):
            span = len(seen.weights["k"]) // target.units if target.unit == "heads" else 1
            gone = removed(target.units * span, budget.at(target.block).amounts[0]) // span
            results.append(self.mask(target, score, Budget(gone, "removed")))
        return results

    def _together(self, targets: Sequence[Target], scores: Sequence[Tensor], budget: Budget) -> Sequence[Tensor]:
        """What lies above the score at which enough of all heads and neurons have gone; it goes too. As released, a
        block that would lose all its heads or neurons keeps them all."""
        if len(budget.amounts) > 1:
            raise PrunelabError(f"llm_pruner (global) prunes one share of all blocks together, not {budget}")
        joined = torch.cat(list(scores))
        gone = removed(len(joined), budget.amounts[0])
        kept = joined > joined.kthvalue(gone).values if gone else torch.ones_like(joined, dtype=torch.bool)
        return [m if bool(m.any()) else ~m for m in kept.split([target.units for target in targets])]
