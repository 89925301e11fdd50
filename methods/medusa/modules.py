"""The learned parts of Medusa: heads that guess further tokens from one hidden state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """x + SiLU(W x + b), in which W starts as zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Heads(nn.ModuleList):
    """Head k (from 0) guesses the token k + 2 places behind the one that a hidden state belongs to.

    Each is a block, and a layer to the vocabulary of its own; with `vocabulary` 0 it ends at the block. With several
    `layers` the one block is applied again and again (released). Names are those of the published checkpoints.
    """

    def __init__(self, width: int, vocabulary: int, heads: int, layers: int = 1) -> None:
        super().__init__()
        for _ in range(heads):
            output = [nn.Linear(width, vocabulary, bias=False)] if vocabulary else []
            self.append(nn.Sequential(*[Block(width)] * layers, *output))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [heads, ..., V], or states [heads, ..., D], of hidden states [..., D]."""
        return torch.stack([head(hidden) for head in self])


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [heads] of each head's logits [heads, B, T, V] with the labels [B, T]; -100 does not count. The
    published heads minimise the sum (Medusa-1, released)."""
    return torch.stack(
        [F.cross_entropy(own[:, : -2 - k].flatten(0, 1), labels[:, 2 + k :].flatten()) for k, own in enumerate(logits)]
    )
