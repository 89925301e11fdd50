"""What an oracle would make of several budgets: each sample under the least one that answers it best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.metrics import uncertainty


def levels(smaller: Sequence[str], largest: Budget) -> list[Budget]:
    """The budgets to choose among, from the least to the run's own. Raises PrunelabError where they do not rise."""
    budgets = [*map(Budget.parse, smaller), largest]
    amounts = [budget.amounts[0] for budget in budgets]
    if len({budget.unit for budget in budgets}) > 1 or sorted(set(amounts)) != amounts:
        raise PrunelabError(
            "an oracle chooses among budgets of one unit that rise to the run's own, not"
            f" {', '.join(map(str, budgets))}"
        )
    return budgets


def chosen(scores: Tensor, budgets: Sequence[Budget]) -> dict[str, Any]:
    """The mean of the best of each sample's scores [levels, n], from 0 to 1, in percent, and the mean of the budgets
    that it takes. What no budget answers counts under the least."""
    # assumption: M3's paper does not say so, but nothing else gives a mean of 31 tokens where 30 % are never right
    best = scores.max(0).values
    least = (scores == best).int().argmax(0)
    amounts = torch.tensor([float(budget.amounts[0]) for budget in budgets])[least]
    whole = bool(((best == 0) | (best == 1)).all())  # some tasks give a part of a point
    answered = uncertainty.share(best.bool()) if whole else uncertainty.mean((100 * best).tolist())
    return {"oracle": answered, "oracle_budget": uncertainty.mean(amounts.tolist())}
