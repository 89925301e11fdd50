"""Adaptive Token Sampling (Fayyaz et al., ECCV 2022): sample tokens by the inverse transform of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common import selection
from common.roles import Signals, TokenPruner
from common.types import Budget, Gather, ModelInfo, Plan, Site


@dataclass(frozen=True)
class AdaptiveTokenSampling(TokenPruner):
    """ATS off the shelf: the budget is the number of quantiles sampled, an upper bound on the tokens that stay.

    layers: 0-based blocks that sample, None for block 3 on as in the paper's off-the-shelf models. Sampling happens
    inside attention: a sampled token carries its row of the attention output on (section 3.2).
    """

    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "ats"
    adaptive: ClassVar[bool] = True
    exempt = {"budget": "quantiles that fall on the same token count once, so fewer tokens may stay than were asked"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layers = range(3, info.depth) if self.layers is None else self.layers
        return [Site(layer, "after_attention") for layer in layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"cls_row", "values"})

    def score(self, site: Site, signals: Signals) -> Tensor:
        """Attention of the class token times the norm of the value, summed over heads and normalised (eq. 3)."""
        scores = (signals.cls_row * signals.values.norm(dim=-1)).float().sum(1)  # [B, N]
        return scores.masked_fill(~signals.prunable, 0)

    def select(self, scores: Tensor, signals: Signals, budget: Budget) -> Gather:
        special = signals.prunable.shape[1] - signals.units
        asked = budget.count(signals.units)
        if asked == signals.units:  # as many quantiles as tokens: nothing to prune, whatever falls where
            return Gather(torch.arange(scores.shape[1], device=scores.device).expand_as(scores), signals.valid)
        prefix = torch.arange(special, device=scores.device).expand(scores.shape[0], -1)
        index, first = selection.inverse_transform_sampling(scores[:, special:], asked)
        index = torch.cat([prefix, index + special], 1)
        valid = torch.cat([torch.ones_like(prefix, dtype=torch.bool), first], 1)
        if index.device.type == "meta":
            return Gather(index)
        return selection.compact(index, valid)

    def family(self, level: float, sites: int, info: ModelInfo) -> Budget:
        return Budget(max(1, round(level * (info.tokens - info.special))), "count")
