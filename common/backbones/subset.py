"""Some tokens of a sequence: what a scanning layer must know to run on a part of the sequence it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Subset:
    """K tokens of a sequence of `total`, in ascending order.

    places [B, K] int64: where each sits. decay: a scan's state decays over the positions between two tokens, else it
    is held (a copy). spread: a convolution along the sequence sees every token at its place with zeros between, else
    it sees the K tokens as neighbours. A convolution over a map always sees them at their places.
    """

    places: Tensor
    total: int
    decay: bool = False
    spread: bool = False

    def reversed(self) -> Subset:
        """The same tokens of the sequence read from its end."""
        return replace(self, places=self.total - 1 - self.places.flip(-1))

    def scatter(self, x: Tensor) -> Tensor:
        """x [B, E, K] at its places in zeros [B, E, total]."""
        full = x.new_zeros(*x.shape[:2], self.total)
        return full.scatter(-1, self.places.unsqueeze(1).expand_as(x), x)

    def gather(self, x: Tensor) -> Tensor:
        """x [B, E, total] at the places of the tokens, [B, E, K]."""
        return x.gather(-1, self.places.unsqueeze(1).expand(-1, x.shape[1], -1))


def gaps(steps: Tensor) -> Tensor:
    """How many steps are missing right before each of steps [..., K], which ascend; 0 before the first."""
    return F.pad(steps.diff(dim=-1) - 1, (1, 0))
