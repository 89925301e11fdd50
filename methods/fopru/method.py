"""FoPru (Jiang et al., 2024): the attention that patches receive within the image encoder says which ones a decoder
needs, one by one or in whole rows.

Unit: a visual token of one crop, before the decoder. A reconstruction: neither code nor the paper's body could be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Positions, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def significance(received: Tensor, class_row: Tensor | None = None) -> Tensor:
    """How much attention [B, N] each token receives from all, a mean over heads of [B, H, N]; without the class token's
    own where that is given."""
    return (received.float() if class_row is None else received.float() - class_row.float()).mean(1)


def of_rows(scores: Tensor, width: int) -> Tensor:
    """For scores [B, N] of a grid, row by row, the sum [B, N] of each token's row; equal ones stay row by row in a
    stable order, so that the best k * width tokens are the best k rows."""
    return scores.unflatten(1, (-1, width)).sum(-1).repeat_interleave(width, 1)


@dataclass(frozen=True)
class FoPru(TokenPruner):
    """FoPru (arXiv 2411.14164): keeps the tokens of each crop that receive most attention in the encoder layer whose
    output the model uses, or the grid's rows that do.

    Parameters
    ----------
    strategy : {"rank", "row"}
        Single tokens, or whole rows: as many as come nearest to the budget, one at least.
    queries : {"all", "patches"}
        Whose attention counts: also the class token's, or patches' alone (needs a class token).
    positions : str
        The kept tokens are numbered anew or keep their numbers.
    """

    strategy: Literal["rank", "row"] = "rank"
    queries: Literal["all", "patches"] = "all"
    positions: Positions = "renumber"

    name: ClassVar[str] = "fopru"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"received"} if self.queries == "all" else {"received", "cls_row"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        return significance(signals.received, None if self.queries == "all" else signals.cls_row)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        scores, crops = self.score(site, signals), len(signals.grids)
        if self.strategy == "rank" and crops == 1:
            return Plan(signals.keep(budget, scores=scores), positions=self.positions)
        signals.one_length(self.name)
        keep = budget.count(signals.units) // crops
        if self.strategy == "row":
            width = signals.grids[0][1]
            scores = of_rows(scores, width)  # the best tokens are then those of the best rows
            keep = width * min(max(1, round(keep / width)), scores.shape[1] // crops // width)
        return Plan(Gather(selection.top_k_of_parts(scores, crops, keep)), positions=self.positions)
