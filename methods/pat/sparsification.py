"""PAT's hybrid sparsification modules, and the mask of hidden channels that they share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.training.parametrizations import straight_through
from prunelab.common.training.schedule import Temperature

STEEPEST = 10.0  # the largest exponent of the sigmoid


def gates(proxy: Tensor, step: int, milestone: int, freeze: float = 0.8) -> Tensor:
    """The gate [D] of every channel at a step: a sigmoid that sharpens, over a floor that sinks, so that all channels
    are open at first. From the share `freeze` of the milestone on it stays as steep, and no gradient passes."""
    temperature = Temperature(milestone, freeze)
    floor = max(0.5 - step / milestone, 0.0)
    proxy = proxy.detach() if step >= temperature.last else proxy
    return 1 / (1 + torch.exp((-temperature(step) * proxy).clamp(max=STEEPEST))) + floor


def fixed_gates(width: int, stays: int, step: int, milestone: int, rate: float = 2.77) -> Tensor:
    """Gates [D] without a choice: the first `stays` channels are open, the others close exponentially, twice as fast
    from the milestone on."""
    passed = step / milestone
    exponent = -rate * passed if step < milestone else -rate - 2 * rate * (passed - 1)
    return torch.where(torch.arange(width) < stays, 1.0, math.exp(exponent))


def mask_loss(proxy: Tensor, stays: int, weight: float = 10.0) -> Tensor:
    """What the number of open channels is off by, as a share and straight through, and how far the proxies lie from one
    half above zero and below it."""
    above = proxy > 0
    count = straight_through((proxy >= 0).to(proxy.dtype), proxy).sum()
    return weight * (count - stays).abs() / stays + _spread(proxy - 0.5, above) + _spread(proxy + 0.5, ~above)


def _spread(distance: Tensor, of: Tensor) -> Tensor:
    """Mean square of some entries; zero of none, where the release would give no number."""
    return (distance.square() * of).sum() / of.sum().clamp_min(1)


def identity_loss(down: Tensor) -> Tensor:
    """How far the rows of D [r, H] are from orthonormal."""
    return (down @ down.T - torch.eye(len(down), device=down.device)).square().mean()


class HiddenMask(nn.Module):
    """The proxies of the hidden channels' gates. gate: at the step that `set` was told last; outside of training the
    channels that stay."""

    gate: Tensor

    def __init__(self, width: int, stays: int, milestone: int, freeze: float, learned: bool, rate: float) -> None:
        super().__init__()
        self.proxy = nn.Parameter(torch.zeros(width), requires_grad=learned)
        self.stays, self.milestone, self.freeze, self.learned, self.rate = stays, milestone, freeze, learned, rate
        self.step = 0

    def forward(self) -> Tensor:
        if not self.training:
            return self.kept().to(self.proxy.dtype)
        if self.learned:
            return gates(self.proxy, self.step, self.milestone, self.freeze)
        return fixed_gates(len(self.proxy), self.stays, self.step, self.milestone, self.rate).to(self.proxy)

    def kept(self) -> Tensor:
        """Which channels stay [D]: as many as asked for, those of the largest proxies."""
        if not self.learned:
            return torch.arange(len(self.proxy), device=self.proxy.device) < self.stays
        best = self.proxy.detach().topk(self.stays).indices
        return torch.zeros_like(self.proxy, dtype=torch.bool).scatter(0, best, True)


class Sparsified(nn.Module):
    """v M (x + U D x) of what is written into the residual stream: D [r, H] at random, U [H, r] zero, v [H] ones."""

    def __init__(self, mask: HiddenMask, rank: int) -> None:
        super().__init__()
        width = len(mask.proxy)
        self.mask = mask
        self.down, self.up = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.scale.dtype)  # the module learns in its own precision
        result: Tensor = self.scale * self.mask() * (wide + wide @ self.down.T @ self.up.T)
        return result.to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """A weight [H, n] whose outputs are what this module makes of this one's, for the channels that stay."""
        factor = (self.scale * self.mask.kept()).detach().unsqueeze(1)
        wide = weight.float()
        return (factor * (wide + self.up.detach() @ (self.down.detach() @ wide))).to(weight.dtype)


def modules(attachments: Any) -> dict[str, Sparsified]:
    """The modules by the names of their targets."""
    return {a.target.name: a.module for a in attachments if isinstance(a.module, Sparsified)}
