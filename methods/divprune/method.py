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
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Distance = Literal["cosine", "l1", "l2"]


def cosine_distance(tokens: Tensor) -> Tensor:
    """One minus the cosine of every pair of tokens [B, M, D]: [B, M, M]."""
    unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(tokens.dtype).tiny)
    return 1 - unit @ unit.transpose(1, 2)


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "l1": lambda tokens: torch.cdist(tokens.float(), tokens.float(), p=1),
    "l2": lambda tokens: torch.cdist(tokens.float(), tokens.float()),
}


def max_min_order(distance: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    """The first `count` tokens [B, count] in the order in which the greedy algorithm picks them.

    distance [B, M, M] is symmetric; `real` [B, M] is False at padding, which is picked last. First comes the token
    whose nearest neighbour is farthest, then, each time, the one farthest from all picked before. The distance to the
    nearest picked token only falls, so one running minimum [B, M] takes the place of a search among all pairs. Ties go
    to the earlier token.
    """
    tokens = distance.shape[-1]
    if count == 0:
        return torch.zeros(len(distance), 0, dtype=torch.long, device=distance.device)
    if real is not None:
        distance = distance.masked_fill(~real.unsqueeze(1), float("inf"))  # padding is nobody's neighbour
    own = min(1, tokens - 1)  # the smallest distance is a token's own, unless there is no other
    nearest = distance.topk(own + 1, dim=-1, largest=False).values[..., own]
    apart = torch.full_like(nearest, float("inf"))  # [B, M] distance to the nearest pick
    if real is not None:
        nearest, apart = (t.masked_fill(~real, float("-inf")) for t in (nearest, apart))
    picks = [nearest.argmax(-1, keepdim=True)]
    rows = torch.arange(len(distance), device=distance.device)
    for _ in range(count - 1):
        last = picks[-1]
        apart = torch.minimum(apart, distance[rows, last.squeeze(-1)])
        apart.scatter_(-1, last, float("-inf"))
        picks.append(apart.argmax(-1, keepdim=True))
    return torch.cat(picks, -1)


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
    positions : str
        The kept tokens are numbered anew, as released, or keep their numbers.
    """

    where: Where = "packed"
    layer: NonNegativeInt = 0
    distance: Distance = "cosine"
    positions: Positions = "renumber"

    name: ClassVar[str] = "divprune"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, self.where)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        visual = signals.candidates()  # [B, M]
        real = None if signals.valid is None else signals.prunable.gather(1, visual)
        order = max_min_order(
            DISTANCES[self.distance](take(signals.hidden, visual)), budget.count(visual.shape[1]), real
        )
        # a sample with fewer tokens than picks repeats some: the first time counts
        return Plan(signals.keep(budget, order=visual.gather(1, order)), positions=self.positions)
