"""ToMe (Bolya et al., ICLR 2023): merge the most similar tokens in every block, between attention and MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Positions, Site
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
    where : {"after_attention", "tower"}
        Between attention and MLP of every block, or between the layers of a language model's image encoder, where no
        attention can be proportional. A number or share to keep is there what is left in the end, and as many tokens
        leave between all layers.
    positions : str
        Behind an image encoder what is merged has no place in the picture, and all are numbered anew (`renumber`).
    """

    proportional: bool = True
    inflection: Annotated[float, Interval(ge=-1, le=1)] = 0.0
    where: Literal["after_attention", "tower"] = "after_attention"
    positions: Positions = "original"

    name: ClassVar[str] = "tome"
    ascending: ClassVar[bool] = False
    exempt = {
        "budget": "at most half of the unprotected tokens of a block can be merged (the official clamp)",
        "padding": "the even-odd split has no padded form; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        first, depth = (0, info.depth) if self.where == "after_attention" else (1, (info.tower or info).depth)
        return [Site(layer, self.where) for layer in range(first, depth)]

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
        matching = self.match(metric, self.leaving(site, signals, budget), special)
        if matching.outputs == total:  # nothing merged: sizes and biases stay as they are
            return Plan(Gather(matching.slot))
        sizes = signals.state.get("sizes", signals.sizes)  # an encoder's are ours to keep
        grown = matching.total(sizes)
        if self.where == "tower":
            signals.state["sizes"] = grown
        bias = grown.log() if self.proportional else None
        return Plan(matching.mix(sizes), key_bias=bias, positions=self.positions)

    def leaving(self, site: Site, signals: TokenSignals, budget: Budget) -> int:
        """How many tokens are to be merged away."""
        if self.where == "after_attention" or budget.unit == "removed":
            return signals.units - budget.count(signals.units)
        target = signals.state.setdefault("target", budget.count(signals.units))
        left = (signals.info.tower or signals.info).depth - site.layer  # the cuts from this one on
        return math.ceil((signals.units - target) / left)

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
        whole = info if self.where == "after_attention" else info.tower or info
        each = (1 - level) * (whole.tokens - whole.special) / sites
        return Budget(tuple(round((i + 1) * each) - round(i * each) for i in range(sites)), "removed")
