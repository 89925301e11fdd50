"""OSSCAR (Meng et al., ICML 2024): heads and neurons leave by optimal brain surgery, and a local search exchanges some
that left for some that stayed.

For the weight W [I, O] of a layer whose inputs X give H = X^T X, the loss of another weight V is half the trace of
V^T H V, less that of V^T H W. Groups of inputs leave a few at a time, the cheapest first, and those that stay are
solved for. The search takes the cheapest groups out once more and brings back as many that gain most, as long as the
loss falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeInt, PositiveFloat, PositiveInt
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import SecondMoment
from prunelab.common.weights.surgery import GONE, damped, group_scores, inverted, solved, surgery
from prunelab.common.weights.targets import Accumulator, Decision, Target, Unit, WeightSignals

ROLES: Mapping[Unit, str] = {"attention_output": "o", "channels": "down"}
SMALLEST = 1e-8  # what is added to a gain's divisor, so that inputs that stay divide nothing by zero


def loss(weight: Tensor, hessian: Tensor, target: Tensor) -> Tensor:
    """The loss of a weight [I, O], up to what no weight changes; target: H W of the dense one."""
    return (weight * (hessian @ weight / 2 - target)).sum()


def gains(hessian: Tensor, target: Tensor, kept: Tensor, size: int) -> Tensor:
    """By how much the loss falls when a group of inputs comes back [I / size]; kept [I]: those that stay. Of groups
    that stay nothing is meant."""
    inverse = inverted(hessian[kept][:, kept])
    shared = hessian[kept]  # [K, I]
    rest = target - shared.T @ (inverse @ target[kept])  # what is left to explain
    if size == 1:
        own = hessian.diagonal() - (shared * (inverse @ shared)).sum(0) + kept * SMALLEST
        return rest.square().sum(1) / own / 2
    groups = torch.arange(len(hessian), device=hessian.device).view(-1, size)
    found = rest.new_zeros(len(groups))
    for number, places in enumerate(groups):
        if not bool(kept[places[0]]):
            beside = shared[:, places]
            own = hessian[places][:, places] - beside.T @ inverse @ beside
            found[number] = (rest[places] * torch.linalg.solve(own, rest[places])).sum() / 2
    return found


def searched(
    weight: Tensor, hessian: Tensor, target: Tensor, stay: Tensor, size: int, tries: int, swap: int
) -> tuple[Tensor, Tensor]:
    """The groups that stay [I / size] and their weight [I, O] after at most so many exchanges of `swap` groups each;
    the first that does not lower the loss ends the search."""
    best, stay = stay.clone(), stay.clone()
    least = loss(weight, hessian, target)
    for _ in range(tries):
        kept = stay.repeat_interleave(size)
        inverse = torch.zeros_like(hessian)
        inverse[kept.nonzero(), kept.nonzero().T] = inverted(hessian[kept][:, kept])
        costs = group_scores(weight, target, inverse, size, gradient=False)
        stay[(costs + GONE * ~stay).argsort()[:swap]] = False
        if not bool(stay.any()):
            break
        found = gains(hessian, target, stay.repeat_interleave(size), size)
        stay[(GONE * stay - found).argsort()[:swap]] = True
        weight = solved(hessian, target, stay.repeat_interleave(size))
        now = loss(weight, hessian, target)
        if not bool(now < least * (1 + 1e-9)):
            break
        best, least = stay.clone(), now
    return best, solved(hessian, target, best.repeat_interleave(size))


@dataclass(frozen=True)
class Osscar(WeightPruner):
    """Structured pruning by combinatorial optimisation layer by layer (arXiv 2403.12983).

    Heads are silenced in the output projection, with what makes up for them in the others; neurons of the MLP leave.
    The budget is the share of each kind that stays, the same in every layer.

    Parameters
    ----------
    heads, neurons : int
        How many leave in one round; the released run's.
    tries : int
        Exchanges of the local search at most; 0 leaves it out, as the released run does.
    swapped_heads, swapped_neurons : int
        How many are exchanged at a time.
    damping : float
        Share of the Hessian's mean diagonal added to it.
    """

    heads: PositiveInt = 2
    neurons: PositiveInt = 10
    tries: NonNegativeInt = 0
    swapped_heads: PositiveInt = 5
    swapped_neurons: PositiveInt = 10
    damping: PositiveFloat = 0.01

    name: ClassVar[str] = "osscar"

    @property
    def units(self) -> Sequence[Unit]:
        return ("attention_output", "channels")

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        return {"hessian": SecondMoment}

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        role = ROLES[target.unit]
        weight = signals.weights[role].float().T.contiguous()
        hessian = damped(signals["hessian"], self.damping)
        return group_scores(weight, hessian @ weight, inverted(hessian), target.span, gradient=False)

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        role, heads = ROLES[target.unit], target.unit == "attention_output"
        weight, gram = signals.weights[role], signals["hessian"].double()
        gone = budget.pruned(target.units)
        rounds = max(1, gone // (self.heads if heads else self.neurons))
        stay, new = surgery(
            weight.double(), gram, target.span, target.units - gone, rounds, self.damping, gradient=False
        )  # fmt: skip
        if self.tries and gone:
            hessian = damped(gram, self.damping)
            dense = weight.double().T.clone()
            dense[gram.diagonal() == 0] = 0
            swap = min(self.swapped_heads if heads else self.swapped_neurons, gone, target.units - gone)
            stay, found = searched(new.T, hessian, hessian @ dense, stay, target.span, self.tries, swap)
            new = found.T
        return Decision(stay, {role: new.to(weight.dtype)}, remove=not heads)
