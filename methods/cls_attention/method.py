"""Class-attention top-k: keep the patches that the class token attends to most (EViT's criterion, Liang et al.,
ICLR 2022, equation 3), without training and without fusing the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


@dataclass(frozen=True)
class ClassAttention(TokenPruner):
    """EViT's criterion (arXiv 2202.07800): scores a patch by the class token's attention to it, averaged over heads.

    Parameters
    ----------
    layers : tuple of int
        0-based blocks with a pruning step behind them.
    """

    layers: tuple[NonNegativeInt, ...] = (2, 5, 8)

    name: ClassVar[str] = "cls_attention"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "block_output") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"cls_row"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        return signals.cls_row.mean(1)
