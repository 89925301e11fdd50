"""A minimal token pruner for everything that the interface offers beyond the scores of one site, so that each mechanism
is exercised before its first paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Mix, ModelInfo, Plan, Positions, Site, Where, take
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


@dataclass(frozen=True)
class MergedFeatures(TokenPruner):
    """Keeps the features that the class token of the encoder's last layer looks at most, and adds every other to the
    kept one whose key is most like its own, as a mean; with the class token among them or without."""

    class_token: bool = False
    positions: Positions = "renumber"

    name: ClassVar[str] = "reference_merged_features"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(0, "encoded", class_token=self.class_token)]

    def readings(self) -> tuple[Reading, Reading]:
        return Reading("queries", -1, "encoder", rows="class"), Reading("keys", -1, "encoder")

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset(self.readings())

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        query, keys = (signals.at(reading) for reading in self.readings())  # [B, H, C, d], [B, H, N, d]
        kept = signals.keep(budget, scores=(keys * query[:, :, :1]).sum((1, 3)))
        index, units = kept.index, signals.prunable.shape[1]
        if kept.outputs == units:  # nothing to merge
            return Plan(kept, positions=self.positions)
        flat = torch.nn.functional.normalize(keys.transpose(1, 2).flatten(2), dim=-1)  # [B, N, C]
        likeness = flat @ take(flat, index).transpose(1, 2)  # [B, N, K]
        open_to = signals.prunable.gather(1, index) if kept.valid is None else kept.valid
        open_to = open_to & signals.prunable.gather(1, index)
        target = likeness.masked_fill(~open_to.unsqueeze(1), float("-inf")).argmax(-1)
        own = torch.arange(kept.outputs, device=index.device).expand_as(index)
        index = index if kept.valid is None else index.masked_fill(~kept.valid, units)
        slot = torch.cat([target, target.new_zeros(len(target), 1)], 1).scatter(1, index, own)[:, :units]
        stays = torch.zeros(len(index), units + 1, device=index.device).scatter(1, index, 1.0)[:, :units] > 0
        merges = signals.prunable & open_to.any(1, keepdim=True)
        weight = (stays | merges).float()
        total = weight.new_zeros(index.shape).scatter_add(1, slot, weight).clamp_min(1)
        every = torch.arange(units, device=index.device).expand_as(slot)
        mix = Mix(slot, every, weight / total.gather(1, slot), kept.outputs, kept.valid)
        return Plan(mix, positions=self.positions)


@dataclass(frozen=True)
class WithClassToken(MergedFeatures):
    """The same with the encoder's class token."""

    class_token: bool = True

    name: ClassVar[str] = "reference_with_class_token"
    exempt = {"keep_all": "the class token comes in addition"}


@dataclass(frozen=True)
class MergedInTower(TokenPruner):
    """Puts pairs of patches that follow each other together inside the image encoder, the first ones, until the budget
    is met, and then keeps the visual tokens that the encoder's last class token looks at."""

    layer: int = 1
    positions: Positions = "renumber"

    name: ClassVar[str] = "reference_merged_in_tower"
    exempt = {
        "budget": "pairs are put together once, in the encoder",
        "keep_all": "the same",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, "tower"), Site(1, "input")]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"hidden"} if site.where == "tower" else {Reading("cls_row", -1, "encoder")})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if site.where != "tower":
            scores = signals.at(Reading("cls_row", -1, "encoder")).float().mean(1)
            return Plan(signals.keep(budget, scores=scores), positions=self.positions)
        batch, total = signals.hidden.shape[:2]
        units, special = max(signals.available()), total - signals.units
        number = torch.arange(total, device=signals.hidden.device) - special
        pairs = units // 4
        slot = torch.where(number < 0, number + special, torch.where(number < 2 * pairs, number // 2, number - pairs))
        slot = torch.where(number < 0, slot, slot + special)
        weight = torch.where((number >= 0) & (number < 2 * pairs), 0.5, 1.0)
        every = torch.arange(total, device=slot.device)
        weight = weight if signals.valid is None else weight * signals.valid  # crops have no padding
        mix = Mix(slot.expand(batch, -1), every.expand(batch, -1), weight.expand(batch, -1), total - pairs)
        return Plan(mix, positions=self.positions)


READERS: tuple[TokenPruner, ...] = (
    TowerAttention(),
    TowerAttention(1, "received", "packed"),
    InTower(),
    EarlierLayers(),
    EarlierLayers((1, 3), "block_output", ("hidden", "cls_row")),
    TextAttention(),
    MergedFeatures(),
    WithClassToken(),
    MergedInTower(),
)


@dataclass(frozen=True)
class Remembering(TokenPruner):
    """Keeps what the words written for the prompt before looked at, and before any the longest."""

    layer: int = 1

    name: ClassVar[str] = "reference_remembering"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, "input")]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"hidden"})

    def observes(self) -> frozenset[Reading]:
        return frozenset({Reading("last_row", self.layer)})

    def observe(self, signals: TokenSignals) -> None:
        seen = signals.at(Reading("last_row", self.layer)).float().mean(1)
        before = signals.memory.get("seen")
        signals.memory["seen"] = seen if before is None or before.shape != seen.shape else before + seen

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        norm, seen = signals.hidden.float().norm(dim=-1), signals.memory.get("seen")
        return norm if seen is None or seen.shape != norm.shape else seen


@dataclass(frozen=True)
class SoftGate(TokenPruner):
    """A learned scorer: while training its gates weigh attention to every token, afterwards the best stay."""

    layer: int = 1

    name: ClassVar[str] = "reference_soft_gate"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(self.layer, "input")]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"hidden"})

    def build(self, info: ModelInfo) -> nn.Module:
        return nn.Linear(info.width, 1)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        with torch.set_grad_enabled(signals.training):
            scores = signals.parts(signals.hidden).squeeze(-1)
            gate = scores.float().sigmoid().masked_fill(~signals.prunable, 1)
        return Plan(signals.keep(budget, scores=scores.detach()), gate=gate)


@dataclass(frozen=True)
class PassingBy(TokenPruner):
    """Tokens pass by single layers, those with the least in their first channel, and come back."""

    layers: tuple[int, ...] = (1, 2)

    name: ClassVar[str] = "reference_passing_by"
    rest = "bypass"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "input") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset({"hidden"})

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        return signals.hidden[..., 0]


@dataclass(frozen=True)
class Leaving(TokenPruner):
    """All visual tokens leave the decoder before a layer, whatever the budget."""

    layer: int = 2

    name: ClassVar[str] = "reference_leaving"
    exempt = {"budget": "none is kept", "keep_all": "none is kept at any budget"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if info.family in ("timm_vit", "plain_mamba") and not info.special:
            raise PrunelabError(f"{self.name} would leave this model nothing")
        return [Site(self.layer, "input")]

    def requires(self, site: Site) -> frozenset[Signal]:
        return frozenset()

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        return Plan(signals.keep(Budget(0, "count"), mask=signals.prunable))


REFERENCES: tuple[TokenPruner, ...] = (*READERS, Remembering(), SoftGate(), PassingBy(), Leaving())
