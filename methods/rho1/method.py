"""Rho-1 (Lin et al., NeurIPS 2024, arXiv 2404.07965): selective language modelling.

A reference model, trained on clean data, says which losses are high for everyone. Only the tokens whose loss exceeds
the reference's most enter the loss of the model that is trained; all of them stay in its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector, best_tokens

Scope = Literal["all", "sample"]


def excess_loss(current: Tensor, reference: Tensor) -> Tensor:
    """Loss of the model that is trained minus that of the reference [n, N] (equation 3)."""
    return current - reference


def keep(excess: Tensor, responses: Tensor, budget: Budget, scope: Scope = "all") -> Tensor:
    """Mask [n, N] of the response tokens of largest excess loss [n, N], of equal ones the earlier; the share is rounded
    down, of all tokens together or of each sample's own."""
    return best_tokens(excess, responses, budget, pooled=scope == "all")


@dataclass(frozen=True)
class Rho1(DataSelector):
    """Rho-1 (arXiv 2404.07965) as the paper has it: in every batch, by the model as it is by then. The paper keeps 0.6
    of the tokens for its model of one billion parameters and 0.7 for that of seven.

    Parameters
    ----------
    scope : {"all", "sample"}
        Whether all tokens of the batch compete, or those of each sample by themselves.
    """

    scope: Scope = "all"

    name: ClassVar[str] = "rho1"
    when: ClassVar[Literal["before", "each_batch"]] = "each_batch"
    chooses: ClassVar[tuple[Literal["samples", "tokens"], ...]] = ("tokens",)
    services: ClassVar[tuple[str, ...]] = ("reference",)

    def requires(self) -> frozenset[str]:
        return frozenset({"loss", "reference_loss"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        excess = excess_loss(examples.loss, examples.reference_loss)
        return DataPlan(tokens=keep(excess, examples.counted, self.budgets(budget)[1], self.scope))


@dataclass(frozen=True)
class Rho1Static(Rho1):
    """Rho-1 (arXiv 2404.07965) as later fine-tuning papers run it: once before the training, by the losses of the
    untouched base model.

    Parameters
    ----------
    scope : {"all", "sample"}
        Whether all tokens of the data compete, or those of each sample by themselves.
    """

    name: ClassVar[str] = "rho1_static"
    when: ClassVar[Literal["before", "each_batch"]] = "before"
