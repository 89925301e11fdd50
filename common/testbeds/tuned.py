"""Fine-tuning with pruning on: the shipped weights of one testbed, trained further under a method."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.testbeds.base import Testbed
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.training import lessons
from prunelab.common.training.recipe import read_log


@dataclass(frozen=True)
class Tuned(Testbed):
    """A testbed that starts from another one's shipped weights; trained and tested with a method at work.

    method: as `common.core.registry.parse` reads it, such as `tome(layers=(2, 5))`; its learned parts become the
    model's. budget: as `Budget.parse` reads it, or several behind one another, `81count; 9count`, each of which every
    batch passes under; the loss is their mean. learns: the method's parts, the model, or both.
    start: sha256 of the weights it starts from, by default those that ship; it stands in the log, and weights that
    were trained anew since ask for a new fine-tuning.
    """

    method: str = ""
    budget: str = "0.7"
    start: str = ""

    learns: ClassVar[lessons.Learns] = "both"

    def __post_init__(self) -> None:
        from prunelab.common.testbeds import SHIPPED

        if not self.start:
            object.__setattr__(self, "start", read_log(SHIPPED / self.base().name)["sha256"])

    @abstractmethod
    def base(self) -> Testbed:
        """The testbed whose weights are the start, and whose data and loss it goes on with."""

    def build(self) -> nn.Module:
        from prunelab.common import testbeds

        model, log = testbeds.load(self.base().name)
        if log["sha256"] != self.start:
            raise PrunelabError(f"{self.name} started from other weights of {log['testbed']}; train {self.name} again")
        return lessons.prepared(self.pruner, model, self.learns)

    @property
    def pruner(self) -> TokenPruner:
        """The method."""
        method = registry.parse(self.method)
        assert isinstance(method, TokenPruner)
        return method

    @property
    def budgets(self) -> list[Budget]:
        """The budgets that every batch passes under."""
        return [Budget.parse(part.strip()) for part in self.budget.split(";")]

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        lots = int(torch.randint(2**31, (), generator=generator))
        return lessons.lesson(self.pruner, model, self.budgets, self.passing(generator), lots)

    def passing(self, generator: torch.Generator) -> Callable[[nn.Module], Any]:
        """A fresh batch: what runs a model on it and gives its outputs, with a `loss`."""
        return lambda model: SimpleNamespace(loss=self.base().loss(model, 1.0, generator))

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        with self.pruned(model):
            return self.base().evaluate(model, quick)

    def pruned(self, model: nn.Module, budget: Budget | None = None, seed: int = 0) -> AbstractContextManager[Any]:
        """The method at work on the model, under the first budget or the one given; `seed` starts the draws of random
        methods."""
        return applied(self.pruner, model, self.budgets[0] if budget is None else budget, seed=seed)
