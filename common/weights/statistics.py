"""Calibration statistics under the field's names. All are float32 and take one sequence [T, C] at a time."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.weights.targets import Accumulator, Observation, Target


class InputAccumulator(Accumulator):
    """A statistic of a target's input channels alone: `take` gets the sequence [T, C] in float32, `seen` counts the
    sequences, that one included, and `reached` says whether any had a token: an expert may see none."""

    shared: ClassVar[bool] = True

    def __init__(self, target: Target) -> None:
        self.seen, self.reached = 0, False
        self.state = torch.zeros(())

    def update(self, observed: Observation) -> None:
        self.seen += 1
        self.reached |= len(observed.inputs) > 0
        self.take(observed.inputs.float())

    @abstractmethod
    def take(self, x: Tensor) -> None:
        """Take in one sequence [T, C]; T may be 0."""

    def value(self) -> Tensor:
        return self.state

    def mean(self, x: Tensor) -> Tensor:
        """The running mean over sequences, moved on by one."""
        self.state = self.state.to(x.device) * ((self.seen - 1) / self.seen) + x / self.seen
        return self.state


class InputNorm(InputAccumulator):
    """Wanda's r_j [C]: the squared L2 norm of a channel over a sequence's tokens, averaged over sequences.

    Where no token came, nothing is known of the channels, and all count alike: 1. (# assumption: the published codes
    take no evidence for evidence of zero, and prune such a matrix from its left edge, or as a whole.)
    """

    def take(self, x: Tensor) -> None:
        self.mean(x.square().sum(0))

    def value(self) -> Tensor:
        return self.state if self.reached else torch.ones_like(self.state)


class TokenCount(InputAccumulator):
    """Tokens that a target read, over all sequences: none where its expert was never chosen."""

    def take(self, x: Tensor) -> None:
        self.state = self.state + len(x)


class InputMean(InputAccumulator):
    """Mean [C] over a sequence's tokens, averaged over sequences."""

    def take(self, x: Tensor) -> None:
        self.mean(x.mean(0) if len(x) else x.new_zeros(x.shape[1]))


class SecondMoment(InputAccumulator):
    """The layer's Hessian [C, C] of half the squared error: 2 x x^T summed over tokens, averaged over sequences.
    Subclasses may `weigh` the tokens."""

    def weigh(self, observed: Observation) -> Tensor | None:
        """Weights [T] of the tokens; None counts all alike."""
        return None

    def update(self, observed: Observation) -> None:
        weights = self.weigh(observed)
        if weights is not None:
            observed = replace(observed, inputs=observed.inputs.float() * weights.float().sqrt().unsqueeze(-1))
        super().update(observed)

    def take(self, x: Tensor) -> None:
        if self.seen == 1:
            self.state = x.new_zeros(x.shape[1], x.shape[1])
        x = x * math.sqrt(2 / self.seen)  # scaled first, as released: the sums round alike
        self.state.mul_((self.seen - 1) / self.seen).addmm_(x.T, x)


class Fluctuation(InputAccumulator):
    """FLAP's fluctuation [C] of a channel around its running mean. As released: the first sequence is skipped, the
    mean is already the new one, and tokens are summed, not averaged."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.fluctuation = torch.zeros(())

    def take(self, x: Tensor) -> None:
        around = self.mean(x.mean(0) if len(x) else x.new_zeros(x.shape[1]))
        n = self.seen
        if n == 1:
            self.fluctuation = torch.zeros_like(around)
        else:
            self.fluctuation = self.fluctuation * ((n - 2) / (n - 1)) + (x - around).square().sum(0) / n

    def value(self) -> Tensor:
        return self.fluctuation
