"""FlowCut (Tong et al., NeurIPS 2025): the flow of information from patches to an image encoder's class token says,
layer by layer, which patches are redundant.

Unit: a patch inside the image encoder. Every second layer some leave, the more the sharper the class token's attention,
until the budget is met before the layer that gives the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site, take
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def semantic(query: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
    """How near each value [B, H, N, d] is to a query's [B, H, 1, d]: the softmax of their products, mean over heads."""
    return (query @ values.mT * scale).squeeze(2).softmax(-1).mean(1)


def importance(attention: Tensor, near: Tensor, value: Tensor) -> Tensor:
    """The paper's score [B, N]: attention and nearness [B, N], each a share of its sum, times the L1 norm of the value
    [B, N, d], a mean over heads."""
    shares = attention / attention.sum(-1, keepdim=True) + near / near.sum(-1, keepdim=True)
    return shares * value.abs().sum(-1)


def leaving(attention: Tensor, target: int, remaining: int) -> int:
    """How many of the N tokens leave by their attention [B, N], with a target to reach in so many cuts after this one:
    (N - target) / sqrt(remaining) * (1 - h^2), h the attention's entropy as a share of the largest. All samples give up
    as many, the most that one of them does."""
    total = attention.shape[1]
    if remaining == 0 or total == 1:
        return total - target
    if attention.device.type == "meta":  # how many leave is in the values; the fewest are taken to
        return 0
    p = attention / attention.sum(-1, keepdim=True)
    share = -torch.special.xlogy(p, p).sum(-1) / math.log(total)
    return round(((total - target) / math.sqrt(remaining) * (1 - share.square())).max().item())


@dataclass(frozen=True)
class FlowCut(TokenPruner):
    """FlowCut (arXiv 2505.19536): patches leave the image encoder layer by layer, by the class token's attention, by
    how near their values are to its own, and by the values' size, smoothed over layers.

    Parameters
    ----------
    decay : float
        Share of the score that comes from the layers before.
    flow : {"class", "mean"}
        The token that information flows to: the class token, or, where there is none, the mean of all (as the paper
        says; no code of it is released for LLaVA).
    second : int, optional
        For large images (2 in the released code): the decoder layer before which the budget is met, by the prompt's
        last token. The encoder then leaves half as many of every crop as the budget has of the image.
    crops : int
        Crops of a large image, of which a ratio is a share.
    last : int, optional
        For encoders that no token can leave, as their ends join patches: one cut behind the projector, by the score
        over so many layers, the encoder's last.
    positions : str
        The kept tokens are numbered anew, as released, or keep their numbers.
    """

    decay: Share = 0.5
    flow: Literal["class", "mean"] = "class"
    second: NonNegativeInt | None = None
    crops: PositiveInt = 5
    last: PositiveInt | None = None
    positions: Positions = "renumber"

    name: ClassVar[str] = "flowcut"
    exempt = {
        "budget": "how many tokens leave before the last cut depends on the attention",
        "batch": "the crops of a batch give up as many, the most that one of them does",
        "padding": "a crop has no padding; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if self.last is not None:
            return [Site(0, "projected")]
        last = (info.tower or info).depth - 2  # behind this layer the budget is met
        if last < 0:
            raise PrunelabError(f"{self.name} needs an image encoder of two layers or more")
        cuts = [Site(layer + 1, "tower") for layer in range(last % 2, last + 1, 2)]
        return cuts if self.second is None else [*cuts, Site(self.second, "input")]

    def requires(self, site: Site) -> frozenset[Signal]:
        if site.where == "input":
            return frozenset({"last_row", Reading("values", site.layer - 1)})
        row = "cls_row" if self.flow == "class" else "received"
        layers = self.layers(site)
        return frozenset(Reading(name, layer, "tower") for layer in layers for name in (row, "values"))

    def layers(self, site: Site) -> range:
        """The encoder's layers that enter the score at a cut: the one before it, and the one before that, which cut
        nothing, or the last ones."""
        return range(max(site.layer - 2, 0), site.layer) if self.last is None else range(-self.last, 0)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        if self.last is not None:
            return self.at_once(site, signals, budget)
        return self.in_decoder(site, signals, budget) if site.where == "input" else self.in_tower(site, signals, budget)

    def target(self, patches: int, budget: Budget) -> int:
        """How many of a crop's patches are left in the end, or of all crops' where the decoder cuts."""
        return budget.count(patches if self.second is None else self.crops * patches)

    def in_tower(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        """A cut of the encoder."""
        signals.one_length(self.name)
        first, state = signals.prunable.shape[1] - signals.units, signals.state
        target = state.setdefault("target", self.target(signals.units, budget))
        target = min(target if self.second is None else target // 2, signals.units)
        attention = self.accumulate(site, signals, first)
        remaining = (signals.info.tower or signals.info).depth - 1 - site.layer
        left = max(signals.units - leaving(attention, target, remaining), target)
        whole = torch.zeros_like(signals.prunable, dtype=torch.float32)
        whole[:, first:] = state["score"]
        kept = signals.keep([left] * len(whole), scores=whole)
        state["score"] = kept.apply(whole)[:, first:]
        return Plan(kept, positions=self.positions)

    def accumulate(self, site: Site, signals: TokenSignals, first: int) -> Tensor:
        """The score of the patches behind the `first` tokens takes in the layers of a cut; the last one's attention
        [B, N] is returned."""
        state = signals.state
        for layer in self.layers(site):
            attention, score = self.layer(signals, layer, first)
            state["score"] = score if "score" not in state else torch.lerp(score, state["score"], self.decay)
        return attention

    def at_once(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        """One cut behind the projector, by the score over the encoder's last layers."""
        signals.state.pop("score", None)  # of the pictures before
        self.accumulate(site, signals, 0)
        return Plan(signals.keep(budget, scores=signals.state["score"]), positions=self.positions)

    def layer(self, signals: TokenSignals, layer: int, first: int) -> tuple[Tensor, Tensor]:
        """Of each patch at hand the attention [B, N] that it gets in a layer, and its score there."""
        values = signals.at(Reading("values", layer, "tower")).float()
        if self.flow == "class":
            row, query = signals.at(Reading("cls_row", layer, "tower")), values[:, :, :1]
        else:
            row, query = signals.at(Reading("received", layer, "tower")), values.mean(2, keepdim=True)
        attention = row.float().mean(1)[:, first:]
        return attention, importance(attention, semantic(query, values)[:, first:], values.mean(1)[:, first:])

    def in_decoder(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        """The second cut: what the prompt's last token attends to, and is near to, among the visual tokens."""
        visual, rows = signals.candidates(), signals.last_row.float()  # [B, M], [B, H, N]
        values = signals.at(Reading("values", site.layer - 1)).float()
        each = visual.unsqueeze(1).expand(-1, rows.shape[1], -1)
        real = signals.prunable.gather(1, visual).unsqueeze(1)
        row = rows.gather(2, each) * real
        attention = (row / row.sum(-1, keepdim=True)).mean(1)  # the softmax over visual keys alone
        last = torch.full_like(visual[:, :1], rows.shape[2] - 1)
        if signals.valid is not None:
            last = last - signals.valid.flip(1).int().argmax(1, keepdim=True)
        query, shown = take(values, last.unsqueeze(1).expand(-1, rows.shape[1], -1)), take(values, each)
        near = semantic(query, shown, values.shape[3] ** -0.5)
        score = importance(attention, near, shown.mean(1))
        whole = torch.zeros_like(signals.prunable, dtype=torch.float32).scatter(1, visual, score)
        assert signals.info.tower is not None
        patches = signals.info.tower.tokens - signals.info.tower.special
        kept = signals.keep(Budget(self.target(patches, budget), "count"), scores=whole)
        return Plan(kept, positions=self.positions)
