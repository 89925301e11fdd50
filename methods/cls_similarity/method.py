"""Similarity to the class token: what a ViT's class-attention criterion becomes where there is no attention.

Pruning by class attention (EViT, Liang et al., ICLR 2022) keeps the patches that the class token looks at. A vision
Mamba has no such row; the nearest thing that every model with a class token has is how much a patch's hidden state is
like the class token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Positions, Site, take
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def similarity(hidden: Tensor, place: Tensor) -> Tensor:
    """Cosine similarity [B, N] of hidden states [B, N, D] to the one at place [B] of each sample."""
    # assumption: cosine; dot products would rank by the norm of the residual stream, which says little of the content
    return F.cosine_similarity(hidden.float(), take(hidden, place.unsqueeze(1)).float(), dim=-1)


@dataclass(frozen=True)
class ClassSimilarity(TokenPruner):
    """A baseline after EViT (arXiv 2202.07800): keeps the patches whose hidden states are most like the class token's.

    Parameters
    ----------
    layers : tuple of int
        0-based blocks with a pruning step behind them.
    positions : str
        How what is kept is numbered (see `Plan`); `renumber` makes it the naive pruning of a scanning model, which
        closes the sequence up.
    """

    layers: tuple[NonNegativeInt, ...] = (2, 5, 8)
    positions: Positions = "original"

    name: ClassVar[str] = "cls_similarity"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if not info.class_token:
            raise PrunelabError(f"{self.name} compares patches to the class token, and this model has none")
        return [Site(layer, "block_output") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        # The class token is the first that cannot be pruned: registers and padding stand behind it.
        return similarity(signals.hidden, (~signals.prunable).int().argmax(1))
