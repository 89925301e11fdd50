"""FasterVLM (Zhang et al., 2024, version 1): the image encoder's class token already says which patches matter.

Unit: a patch of the image encoder. The ranking is made before the decoder and without the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Positions, Site, Where
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def class_attention(cls_row: Tensor) -> Tensor:
    """The paper's score [B, N]: the attention [B, H, N] of the class token, averaged over heads."""
    return cls_row.mean(1)


@dataclass(frozen=True)
class FasterVLM(TokenPruner):
    """FasterVLM (arXiv 2412.01818, version 1): keeps the patches that the encoder's class token attends to most, in the
    layer whose output the model uses.

    Parameters
    ----------
    where : str
        `projected` ranks every crop of an image by itself, as the paper does, and a number in the budget is a crop's;
        `packed` ranks all tokens of a prompt together.
    newlines : bool
        Whether rows of a large image keep their newline tokens, as its model packs them; released without.
    positions : str
        The kept tokens are numbered anew, as released, or keep their numbers (one crop or `packed` only).
    """

    where: Where = "projected"
    newlines: bool = True
    positions: Positions = "renumber"

    name: ClassVar[str] = "fastervlm"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, self.where)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"cls_row"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        return class_attention(signals.cls_row)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        scores, crops = self.score(site, signals), len(signals.grids)
        if self.where == "projected" and crops > 1:
            kept = Gather(selection.top_k_of_parts(scores, crops, budget.count(scores.shape[1] // crops)))
        else:
            kept = signals.keep(budget, scores=scores)
        # places are values, which the meta device has none of
        nowhere = None if self.newlines else torch.full((*kept.index.shape, 3), -1, device="cpu")
        return Plan(kept, layout=nowhere, positions=self.positions)
