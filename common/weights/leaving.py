"""What a mixture of experts loses with each set of experts that leaves it: tokens are sent anew among those that stay.

Shape letters: E experts, T tokens, k experts a token is sent to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunelab.common.weights.targets import Accumulator, Observation, Target


class Losses(Accumulator):
    """For each set of experts that stay, ||Z - Z'|| of the mixture's outputs with all and with those, [S]: the root of
    squares summed over `together` sequences, added up over all such batches."""

    def __init__(self, target: Target, stays: Sequence[Tensor], together: int = 1) -> None:
        self.experts, self.stays, self.together = target.units, stays, together
        self.losses = torch.zeros(len(stays), dtype=torch.float64)
        self.squares, self.waiting = torch.zeros_like(self.losses), 0

    def update(self, observed: Observation) -> None:
        routing, inputs = observed.routing, observed.inputs
        assert routing is not None and routing.among is not None
        outputs = torch.stack([routing.expert(expert, inputs) for expert in range(self.experts)], 1)  # [T, E, D]
        found = []
        for stays in self.stays:
            chosen, gates = routing.among(stays)
            sent = outputs.take_along_dim(chosen.long().unsqueeze(-1), 1)  # [T, k, D]
            left = (sent * gates.unsqueeze(-1).to(sent.dtype)).sum(1)
            found.append((routing.routed - left).double().square().sum())
        self.squares += torch.stack(found).cpu()
        self.waiting += 1
        if self.waiting == self.together:
            self._add()

    def _add(self) -> None:
        self.losses += self.squares.sqrt()
        self.squares, self.waiting = torch.zeros_like(self.losses), 0

    def value(self) -> Tensor:
        if self.waiting:
            self._add()
        return self.losses


def all_but_one(experts: int) -> list[Tensor]:
    """The sets of experts that stay where one leaves, by the number of that one."""
    everything = torch.arange(experts)
    return [everything[everything != gone] for gone in range(experts)]
