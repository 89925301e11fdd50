"""The role of methods that choose training data."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method
from prunelab.common.core.plan import Gather, Plan


class SampleSelector(Method):
    """Chooses training samples or training tokens."""

    role: ClassVar[str] = "sample_selector"

    @abstractmethod
    def score(self, features: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Importance [n] of every sample from its features [n, D]."""

    def plan(self, features: Tensor, budget: Budget, rng: torch.Generator | None = None) -> Plan:
        """Samples that stay, [1, K] in original order."""
        scores = self.score(features, rng).unsqueeze(0)
        index, valid = selection.top_k(scores, budget.count(scores.shape[-1]))
        return Plan(Gather(index, valid))
