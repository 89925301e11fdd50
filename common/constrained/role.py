"""The role of methods that sample under a constraint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method


class ConstrainedSampler(Method):
    """Samples the next token under a constraint that is costly to check."""

    role: ClassVar[str] = "constrained_sampler"

    @property
    def proper(self) -> bool:
        """Whether weights are proper: with p = softmax(logits), E[exp(log_weight) 1[token = x]] = p(x) 1[allows(x)] for
        every token x. Their mean is then the mass that the constraint leaves, and texts can be weighed by them."""
        return False

    @abstractmethod
    def sample(
        self, logits: Tensor, allows: Callable[[int], bool], budget: Budget, rng: torch.Generator | None = None
    ) -> tuple[int, float]:
        """A token that `allows` accepts and its log importance weight, from logits [V].

        budget: calls of the constraint, out of the V that a full mask takes. A dead end, where no allowed token is
        found, is the token -1 with the weight -inf. rng: a generator of the CPU, wherever the logits are.
        """
