"""How a budget is reached in rounds: prune some, measure again, perhaps fine-tune, prune more."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.targets import Decision, Target

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prunelab.common.weights.adapters.base import WeightAdapter

Tune = Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class Rounds:
    """So many rounds on the way from the dense model to the budget.

    Parameters
    ----------
    count : int
        Rounds; 1 prunes at once.
    law : str
        `linear` takes the same number of the dense model's units in each round, `geometric` the same share of what is
        left.
    step : float
        Where it is below 1, a round takes this share of the dense model's units, the last one what is left to take, in
        as many rounds as that makes; `count` and `law` are not used.
    """

    count: int = 1
    law: Literal["linear", "geometric"] = "linear"
    step: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.step <= 0:
            raise PrunelabError(f"a budget is reached in at least one round, by steps above 0, not in {self}")

    def budgets(self, budget: Budget) -> list[Budget]:
        """What may stay of the dense model after each round."""
        if self.step < 1:
            return self._stepped(budget)
        if self.count == 1:
            return [budget]
        if budget.unit not in ("ratio", "removed"):
            raise PrunelabError(f"{budget} is reached at once; rounds take a ratio, or a number removed")
        return [self._after(number, budget) for number in range(1, self.count)] + [budget]

    def _stepped(self, budget: Budget) -> list[Budget]:
        if budget.unit != "ratio" or isinstance(budget.amount, tuple):
            raise PrunelabError(f"{budget} is reached at once; rounds of a fixed step take one ratio")
        taken, whole = (number * self.step for number in itertools.count(1)), 1 - budget.amounts[0]
        return [Budget(1 - t) for t in itertools.takewhile(lambda t: t < whole - 1e-9, taken)] + [budget]

    def _after(self, number: int, budget: Budget) -> Budget:
        share = number / self.count
        amounts: tuple[float, ...]
        if budget.unit == "removed":
            amounts = tuple(round(amount * share) for amount in budget.amounts)
        elif self.law == "geometric":
            amounts = tuple(float(amount) ** share for amount in budget.amounts)
        else:
            amounts = tuple(1 - (1 - amount) * share for amount in budget.amounts)
        return replace(budget, amount=amounts if isinstance(budget.amount, tuple) else amounts[0])


def tuned(adapter: WeightAdapter, pruned: Sequence[tuple[Target, Tensor]], tune: Tune, number: int) -> None:
    """Let the user train the model after a round, while what is pruned stays at zero: its gradients are masked, and
    whatever an optimiser made of it is undone."""
    model, training = adapter.model, adapter.model.training
    with torch.enable_grad(), _still(adapter, pruned):
        tune(model, number)
    model.train(training)
    for target, mask in pruned:
        adapter.write(target, Decision(mask, remove=False))


@contextmanager
def _still(adapter: WeightAdapter, pruned: Sequence[tuple[Target, Tensor]]) -> Iterator[None]:
    """No gradients for the weights that are pruned, or that read what is."""
    stays: Mapping[int, tuple[nn.Parameter, Tensor]] = adapter.staying(pruned)
    handles = [p.register_hook(lambda g, mask=mask: g * mask.to(g)) for p, mask in stays.values() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
