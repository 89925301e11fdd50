"""FastV (Chen et al., ECCV 2024): behind layer K a decoder hardly looks at its image tokens, so most of them go.

Unit: an image token of the decoder's sequence. One decision, before layer K, read off one row of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Positions, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def attention_score(last_row: Tensor) -> Tensor:
    """The paper's criterion [B, N]: the attention that the last token of the prompt pays to each token, for the
    attention [B, H, N] of its heads, averaged over them."""
    return last_row.mean(1)


@dataclass(frozen=True)
class FastV(TokenPruner):
    """FastV (arXiv 2403.06764): keeps the image tokens that the prompt's last token attends to most in the layer before
    `layer`.

    Parameters
    ----------
    layer : int
        K, the first layer (from 0) that sees fewer tokens; the ranking is taken from layer K - 1.
    positions : str
        Kept tokens keep their position numbers as in the paper, or are numbered anew.
    """

    layer: NonNegativeInt = 2
    positions: Positions = "original"

    name: ClassVar[str] = "fastv"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, "input")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"last_row"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        return attention_score(signals.last_row)
