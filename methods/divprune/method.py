"""DivPrune (Alvar et al., CVPR 2025): of all subsets of visual tokens, one whose nearest pair is far apart.

Unit: a visual token as the decoder is about to read it. The max-min diversity problem is solved greedily; neither text
nor attention is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site, Where, take
from prunelab.common.core.selection import cosine_distance, max_min_order
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Distance = Literal["cosine", "l1", "l2"]


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "l1": lambda tokens: torch.cdist(tokens.float(), tokens.float(), p=1),
    "l2": lambda tokens: torch.cdist(tokens.float(), tokens.float()),
}


def turned_round(distance: Tensor) -> Tensor:
    """Distances [B, N, N] under which the greedy rule picks what is near to all that was picked before: `min-max`."""
    own = torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device)
    return (distance.amax((1, 2), keepdim=True) - distance).masked_fill(own, 0.0)


@dataclass(frozen=True)
class DivPrune(TokenPruner):
    """DivPrune (arXiv 2503.02175): keeps a subset of the visual tokens that is as diverse as the greedy max-min rule
    makes it.

    Parameters
    ----------
    where, layer : str, int
        The sequence before the decoder, or what enters a decoder layer (the paper's ablation, `input`).
    distance : {"cosine", "l1", "l2"}
        Between two tokens; `l1` and `l2` are the paper's other two.
    rule : {"max-min", "min-max"}
        Whether the subset is as diverse or as alike as the greedy rule makes it (the paper's ablation).
    positions : str
        The kept tokens are numbered anew, as released, or keep their numbers.
    """

    where: Where = "packed"
    layer: NonNegativeInt = 0
    distance: Distance = "cosine"
    rule: Literal["max-min", "min-max"] = "max-min"
    positions: Positions = "renumber"

    name: ClassVar[str] = "divprune"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, self.where)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        visual = signals.candidates()  # [B, M]
        real = None if signals.valid is None else signals.prunable.gather(1, visual)
        distance = DISTANCES[self.distance](take(signals.hidden, visual))
        distance = distance if self.rule == "max-min" else turned_round(distance)
        order = max_min_order(distance, budget.count(visual.shape[1]), real)
        # a sample with fewer tokens than picks repeats some: the first time counts
        return Plan(signals.keep(budget, order=visual.gather(1, order)), positions=self.positions)
