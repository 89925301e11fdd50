"""Focus-DETR (Zheng et al., ICCV 2023): only foreground tokens are updated in a deformable detection encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, Share
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site, take
from prunelab.common.core.selection import descending
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.focus_detr.modules import DualAttention, FocusParts

Criterion = Literal["learned", "proposal", "class"]


def focus_counts(budget: Budget, valid: Sequence[int]) -> list[int]:
    """Tokens that may be updated in each image, of its `valid` ones: the ratio rounded down and one more (released),
    at least one, at most all."""
    return [max(1, min(budget.count(n) + (budget.unit == "ratio"), n)) for n in valid]


def layer_count(cascade: float, most: int) -> int:
    """Queries of a layer out of the `most` tokens of any image: a product in single precision, rounded down (released),
    and at least one."""
    return max(1, int(np.float32(cascade) * np.float32(most)))


def fill_padding(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Scores [B, N] with those of padding set to the least score of the batch."""
    return scores if valid is None else scores.masked_fill(~valid, float(scores.min()))


def rank(scores: Tensor, valid: Tensor | None) -> Tensor:
    """[B, N] places from the most to the least likely foreground, padding last."""
    return descending(scores if valid is None else scores.masked_fill(~valid, float("-inf")))


def select(ranking: Tensor, counts: Sequence[int], cascade: float) -> Gather:
    """The queries of one layer, best first: the cascade's share of the largest count, for all images alike. Those
    beyond an image's own count take part in attention but are not written back."""
    index = ranking[:, : layer_count(cascade, max(counts))]
    if min(counts) >= index.shape[1]:
        return Gather(index)
    own = torch.tensor(counts, device=index.device).unsqueeze(1)
    return Gather(index, torch.arange(index.shape[1], device=index.device) < own)


def enhance(
    hidden: Tensor, positions: Tensor, foreground: Tensor, class_logits: Tensor, attention: DualAttention, top: int
) -> Tensor:
    """Object tokens exchange information: those with the largest product of class logit and foreground logit.

    hidden and positions [B, K, D], foreground [B, K], class_logits [B, K, classes]. Both logits are raw, so two
    negative ones rank high (as released). Fewer than `top` tokens all take part.
    """
    score = class_logits.amax(-1) * foreground
    best = score.topk(min(top, score.shape[1]), dim=1).indices
    updated = attention(take(hidden, best), take(positions, best))
    return hidden.scatter(1, best.unsqueeze(-1).expand_as(updated), updated)


@dataclass(frozen=True)
class FocusDETR(TokenPruner):
    """Focus-DETR (arXiv 2307.12612). Its natural budget is `Budget(0.5)`: half of an image's tokens may be updated at
    all.

    Parameters
    ----------
    cascade : tuple of float
        Share of those that each encoder layer updates, one a layer.
    criterion : {"learned", "proposal", "class"}
        `learned` scores tokens by the paper's scorer and needs its parts; two training-free stand-ins run on any
        detector, without dual attention: `proposal` scores by the two-stage detector's own first stage, `class` by the
        class head on the tokens as they are.
    objects : int
        Tokens that take part in the dual attention of a layer; 0 leaves it out.
    """

    cascade: tuple[Share, ...] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)
    criterion: Criterion = "learned"
    objects: NonNegativeInt = 300

    name: ClassVar[str] = "focus_detr"
    rest = "bypass"
    ascending: ClassVar[bool] = False
    exempt = {
        "budget": "the first layer gets one token more than the ratio says, and later layers a share of that",
        "keep_all": "the cascade leaves tokens out of the later layers, and dual attention changes tokens",
        "padding": "the scorer's level mean runs over padding, as released",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cascade:
            raise PrunelabError("focus_detr: the cascade is one share for each encoder layer")

    def build(self, info: ModelInfo) -> FocusParts | None:
        return FocusParts(info.width, info.heads, info.depth, info.levels) if self.criterion == "learned" else None

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if len(self.cascade) != info.depth:
            raise PrunelabError(
                f"focus_detr: the cascade names {len(self.cascade)} layers, this encoder has {info.depth}; set cascade"
            )
        return [Site(layer, "input") for layer in range(info.depth)]

    def requires(self, site: Site) -> frozenset[str]:
        if self.criterion != "learned":
            return frozenset({f"{self.criterion}_logits"}) if site.layer == 0 else frozenset()
        scoring = frozenset({"encoder_memory"}) if site.layer == 0 else frozenset()
        return scoring | (frozenset({"positions", "class_weight", "class_bias"}) if self.objects else frozenset())

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        """Foreground logits [B, N], of the features before the encoder."""
        if self.criterion != "learned":
            return getattr(signals, f"{self.criterion}_logits").amax(-1)
        with torch.set_grad_enabled(signals.parts.training):  # plans are made without gradients; the scorer learns
            return signals.parts(signals.encoder_memory, signals.grids)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        state, valid = signals.state, signals.valid
        if site.layer == 0:  # the ranking is made once and holds for all layers
            scores = self.score(site, signals).detach().float()
            state["foreground"], state["ranking"] = fill_padding(scores, valid), rank(scores, valid)
        available = [signals.units] * len(state["ranking"]) if valid is None else valid.sum(1).tolist()
        counts = focus_counts(budget, available)
        return Plan(select(state["ranking"], counts, self.cascade[site.layer]), rest=self.rest)

    def refine(self, site: Site, hidden: Tensor, signals: TokenSignals, plan: Plan) -> Tensor:
        if self.criterion != "learned" or not self.objects or not isinstance(plan.reduce, Gather):
            return hidden
        index = plan.reduce.index
        positions = take(signals.positions.expand(index.shape[0], -1, -1), index)
        logits = functional.linear(hidden, signals.class_weight, signals.class_bias)
        foreground = signals.state["foreground"].gather(1, index)
        return enhance(hidden, positions, foreground, logits, signals.parts.dual[site.layer], self.objects)
