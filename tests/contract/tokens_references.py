"""A minimal token pruner for everything that the interface offers beyond the scores of one site, so that each mechanism
is exercised before its first paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunelab.common.core.plan import ModelInfo, Positions, Site, Where
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


@dataclass(frozen=True)
class TowerAttention(TokenPruner):
    """Class attention, or attention received, of the last few layers of an image encoder, summed."""

    last: int = 2
    signal: str = "cls_row"
    where: Where = "projected"
    positions: Positions = "renumber"

    name: ClassVar[str] = "reference_tower_attention"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, self.where)]

    def readings(self) -> list[Reading]:
        return [Reading(self.signal, -1 - back, "tower") for back in range(self.last)]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset(self.readings())

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        rows = [signals.at(reading) for reading in self.readings()]
        return sum(row.mean(1) for row in rows[1:]) + rows[0].mean(1)


@dataclass(frozen=True)
class InTower(TokenPruner):
    """Drops patches inside the image encoder, by the attention they receive."""

    layers: tuple[int, ...] = (1,)
    positions: Positions = "renumber"

    name: ClassVar[str] = "reference_in_tower"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "tower") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"received"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        return signals.received.mean(1)


@dataclass(frozen=True)
class EarlierLayers(TokenPruner):
    """What earlier layers say of the tokens that are still there: two cuts, both by the first layers' rows."""

    layers: tuple[int, ...] = (1, 3)
    where: Where = "input"
    reads: tuple[str, ...] = ("last_row", "hidden")

    name: ClassVar[str] = "reference_earlier_layers"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, self.where) for layer in self.layers]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset(Reading(name, 0) for name in self.reads)

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        total = 0 * signals.prunable.float()
        for name in self.reads:
            value = signals.at(Reading(name, 0)).float()
            total = total + (value.norm(dim=-1) if name == "hidden" else value.mean(1))
        return total


@dataclass(frozen=True)
class TextAttention(TokenPruner):
    """The attention that the text behind the picture pays, in an earlier layer."""

    layer: int = 2

    name: ClassVar[str] = "reference_text_attention"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, "input")]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({Reading("attention", self.layer - 1, rows="text")})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        (reading,) = (r for r in self.requires(site) if isinstance(r, Reading))
        return signals.at(reading).float().sum(2).mean(1)


READERS: tuple[TokenPruner, ...] = (
    TowerAttention(),
    TowerAttention(1, "received", "packed"),
    InTower(),
    EarlierLayers(),
    EarlierLayers((1, 3), "block_output", ("hidden", "cls_row")),
    TextAttention(),
)
