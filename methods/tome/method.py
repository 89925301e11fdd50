"""ToMe (Bolya et al., ICLR 2023): merge the most similar tokens in every block, between attention and MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.core.selection import Matching, bipartite_matching
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def schedule(blocks: int, removed: int | Sequence[int], inflection: float = 0.0) -> list[int]:
    """Tokens to remove in each block. A number is spread evenly; inflection -1 decreases from 2r to 0, +1 the other
    way round. A list is used as it is, padded with zeros."""
    if not isinstance(removed, int):
        return (list(removed) + [0] * blocks)[:blocks]
    low = int(removed * (1 - inflection))
    high = 2 * removed - low
    return [int(low + (high - low) / max(blocks - 1, 1) * i) for i in range(blocks)]


@dataclass(frozen=True)
class ToMe(TokenPruner):
    """Token merging (arXiv 2210.09461). Its natural budget is `Budget(13, "removed")`: r tokens fewer after every block
    (below 1, that share of the model's patches).

    Parameters
    ----------
    proportional : bool
        Tokens attract attention in proportion to their size (section 3.2); the paper switches it off for MAE models
        used off the shelf.
    inflection : float
        Bends a single number over the depth, see `schedule`.
    """

    proportional: bool = True
    inflection: Annotated[float, Interval(ge=-1, le=1)] = 0.0

    name: ClassVar[str] = "tome"
    ascending: ClassVar[bool] = False
    exempt = {
        "budget": "at most half of the unprotected tokens of a block can be merged (the official clamp)",
        "padding": "the even-odd split has no padded form; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "after_attention") for layer in range(info.depth)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"keys", "sizes"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        if budget.unit == "removed" and 0 < budget.amounts[0] < 1:  # a share of the patches: 13 of 196 is 0.0663
            patches = signals.info.tokens - signals.info.special
            budget = Budget(round(budget.amounts[0] * patches), "removed")
        if self.inflection and budget.unit == "removed":
            every = schedule(signals.info.depth, int(budget.amounts[0]), self.inflection)
            budget = Budget(every[site.index], "removed")
        total = signals.prunable.shape[1]
        special = total - signals.units
        # float32 keeps the choice reproducible in half precision, where similarities tie
        metric = signals.keys.float().mean(1)  # [B, N, d]
        matching = self.match(metric, signals.units - budget.count(signals.units), special)
        if matching.outputs == total:  # nothing merged: sizes and biases stay as they are
            return Plan(Gather(matching.slot))
        mix = matching.mix(signals.sizes)
        bias = matching.total(signals.sizes).log() if self.proportional else None
        return Plan(mix, key_bias=bias)

    def match(self, metric: Tensor, removed: int, special: int) -> Matching:
        """The released code knows a class and a distillation token, which take part in the even-odd split; longer
        prefixes (registers) are set apart before it."""
        if special <= 2:
            return bipartite_matching(metric, removed, class_token=special > 0, distill_token=special > 1)
        rest = bipartite_matching(metric[:, special:], removed)
        prefix = torch.arange(special, device=metric.device).expand(metric.shape[0], -1)
        return Matching(torch.cat([prefix, rest.slot + special], 1), rest.outputs + special)

    def family(self, level: float, sites: int, info: ModelInfo) -> Budget:
        """The same share of (1 - level) of the patches leaves in every block, whole tokens spread evenly."""
        each = (1 - level) * (info.tokens - info.special) / sites
        return Budget(tuple(round((i + 1) * each) - round(i * each) for i in range(sites)), "removed")
