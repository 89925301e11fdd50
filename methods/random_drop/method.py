"""Random token dropping: the content-blind baseline of the token-pruning tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Positions, Rest, Site, Where
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


@dataclass(frozen=True)
class RandomDrop(TokenPruner):
    """A baseline: keeps units by lot, drawn anew for every sample.

    Parameters
    ----------
    layers : tuple of int
        0-based layers.
    where, rest, positions : str
        The kind of site and what becomes of the others, so that every method has this control at its own sites: `input`
        and `bypass` in a deformable encoder, `halt` in a segmenter, `decay` in a scan (see `Plan`).
    """

    layers: tuple[NonNegativeInt, ...] = (2, 5, 8)
    where: Where = "block_output"
    rest: Rest = "drop"
    positions: Positions = "original"

    name: ClassVar[str] = "random_drop"
    exempt = {
        "batch": "every sample draws its own lot",
        "padding": "the lots of real tokens depend on how many tokens are drawn for",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, self.where) for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        shape, device = signals.prunable.shape, signals.prunable.device
        return torch.rand(shape, generator=signals.rng, device=device)
