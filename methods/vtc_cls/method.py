"""VTC-CLS (Wang, 2024): what the image encoder's class token attends to in its last layers, taken together, says which
patches a decoder needs.

Unit: a patch of the image encoder. The ranking is made before the projector and without the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.core.plan import ModelInfo, Positions, Site, Where
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def ensembled_attention(cls_rows: Iterable[Tensor]) -> Tensor:
    """The paper's score [B, N]: the attention [B, H, N] of the class token, averaged over heads and summed over
    layers."""
    return torch.stack([row.mean(1) for row in cls_rows]).sum(0)


@dataclass(frozen=True)
class VTCCLS(TokenPruner):
    """VTC-CLS (arXiv 2412.05819): keeps the patches that the encoder's class token attends to most, in the sum over the
    last layers up to the one whose output the model uses.

    Parameters
    ----------
    last : int
        Layers in the sum. The released script counts from the other end: its start s is 23 - `last` of CLIP's 24.
    where, layer : str, int
        `projected` prunes an image's features, as released; `input` and a layer prune there instead, within the
        decoder (the paper's variant behind two layers is layer 2).
    positions : str
        The kept tokens are numbered anew, as released, or keep their numbers.
    """

    last: PositiveInt = 3
    where: Where = "projected"
    layer: NonNegativeInt = 0
    positions: Positions = "renumber"

    name: ClassVar[str] = "vtc_cls"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, self.where)]

    def requires(self, site: Site) -> frozenset[Reading]:
        return frozenset(Reading("cls_row", -1 - back, "tower") for back in range(self.last))

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        # from the first layer to the last: sums of floats depend on their order
        readings = sorted(self.requires(site), key=lambda reading: reading.layer)
        return ensembled_attention(signals.at(reading) for reading in readings)
