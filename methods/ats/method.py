"""Adaptive Token Sampling (Fayyaz et al., ECCV 2022): sample tokens by the inverse transform of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


@dataclass(frozen=True)
class AdaptiveTokenSampling(TokenPruner):
    """ATS (arXiv 2111.15667) off the shelf.

    The budget counts quantiles, as a share or number of the model's patches; the tokens they fall on stay, so it is an
    upper bound. The released models use one quantile a patch, `Budget(1.0)`.

    Parameters
    ----------
    layers : tuple of int, optional
        0-based blocks that sample, None for block 3 on as released. Sampling happens inside attention: a sampled token
        carries its own row of the attention output on.
    """

    layers: tuple[NonNegativeInt, ...] | None = None

    name: ClassVar[str] = "ats"
    adaptive = True
    exempt = {
        "keep_all": "with a quantile for every patch, patches of little weight are still missed: that is the method",
        "budget": "quantiles that fall on the same token count once, so fewer tokens stay than quantiles were asked",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        layers = range(min(3, info.depth - 1), info.depth) if self.layers is None else self.layers
        return [Site(layer, "after_attention") for layer in layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"cls_row", "values"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        """Attention of the class token, summed over heads, times the norm of the whole value vector (eq. 3)."""
        return signals.cls_row.float().sum(1) * signals.values.float().square().sum((1, 3)).sqrt()  # [B, N]

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        scores = self.score(site, signals)
        patches = signals.info.tokens - signals.info.special
        quantiles = int(budget.amounts[0]) if budget.unit == "count" else budget.count(patches)
        if scores.device.type == "meta":  # every quantile on a token of its own
            return Plan(signals.keep(Budget(quantiles, "count"), scores=scores))
        return Plan(signals.keep(mask=selection.inverse_transform_sampling(scores, quantiles, signals.prunable)))

    def family(self, level: float, sites: int, info: ModelInfo) -> Budget:
        """Up to four quantiles a patch, beyond which hardly a token is missed."""
        return Budget(max(1, round(4 * level * (info.tokens - info.special))), "count")
