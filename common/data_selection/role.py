"""The role of methods that choose training data: samples, tokens, and how much each counts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.core.plan import Gather
from prunelab.common.data_selection.examples import Examples

ALL = Budget(1.0)


@dataclass(frozen=True)
class DataPlan:
    """What a method decided on n samples.

    samples: those that stay, [1, K] ascending, None for all. tokens: mask [n, N] of the tokens that enter the loss,
    None for all that did before. weight: what each sample [n] or token [n, N] counts in it. The last two speak of all
    n samples, also of those that go.
    """

    samples: Gather | None = None
    tokens: Tensor | None = None
    weight: Tensor | None = None


class DataSelector(Method):
    """Chooses training samples and training tokens.

    when: `before` training, on a corpus, or `each_batch` with the model as it is by then. chooses: what its budget
    speaks of; of two amounts the first is for samples and the second for tokens. attention_layer: the layer whose
    attention the signals `prompt_attention`, `rater_attention` and `last_attention` are of.
    """

    role: ClassVar[str] = "data_selector"
    when: ClassVar[Literal["before", "each_batch"]] = "before"
    chooses: ClassVar[tuple[Literal["samples", "tokens"], ...]] = ("samples",)
    attention_layer: int = -1

    def requires(self) -> frozenset[str]:
        """The signals that the method reads, see `Examples`."""
        return frozenset()

    @abstractmethod
    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        """What stays of a corpus or a batch."""

    def budgets(self, budget: Budget) -> tuple[Budget, Budget]:
        """The budget of samples, and that of tokens."""
        expected = max(len(self.chooses), 1)
        if len(budget.amounts) != expected:
            says = " and ".join(self.chooses) or "nothing, but weighs it"
            raise PrunelabError(
                f"{self.name} chooses {says}: it takes {expected} amount{'s' * (expected > 1)}, and the budget {budget}"
                f" has {len(budget.amounts)}"
            )
        if budget.unit not in ("ratio", "count", "removed"):
            raise PrunelabError(f"training data cannot be budgeted in {budget.unit}; use ratio, count or removed")
        if not self.chooses and budget != ALL:
            raise PrunelabError(f"{self.name} weighs data and drops none; its budget is 1.0")
        parts = {part: budget.at(place) for place, part in enumerate(self.chooses)}
        return parts.get("samples", ALL), parts.get("tokens", ALL)


def best_samples(scores: Tensor, budget: Budget) -> Gather:
    """The samples of largest scores [n], in their own order; of equal ones the earlier."""
    return Gather(selection.top_k(scores.unsqueeze(0), budget.count(len(scores)))[0])


def best_tokens(scores: Tensor, counted: Tensor, budget: Budget, *, up: bool = False, pooled: bool = False) -> Tensor:
    """Mask [n, N] of the counted tokens of largest scores [n, N]; of equal ones the earlier.

    up: a sample's share of tokens is rounded up, not down. pooled: the tokens of all samples compete.
    """
    if pooled:
        flat = best_tokens(scores.reshape(1, -1), counted.reshape(1, -1), budget, up=up)
        return flat.view_as(counted)
    available = counted.sum(1, keepdim=True)
    amount = budget.amounts[0]
    if budget.unit == "ratio":
        exact = (amount * available.double() * 1e6).round() / 1e6  # 0.7 stored in single precision still means 0.7
        kept = exact.ceil() if up else exact.floor()
    else:
        kept = available - amount if budget.unit == "removed" else torch.full_like(available, int(amount))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    order = selection.descending(scores.masked_fill(~counted, float("-inf")))
    rank = torch.arange(counted.shape[1], device=counted.device).expand_as(counted)
    best = torch.zeros_like(counted).scatter(1, order, rank < kept)
    return best & counted
