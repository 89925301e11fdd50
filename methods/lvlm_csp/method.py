"""LVLM_CSP (Chen et al., 2025): a decoder that says where to segment reads few image tokens at first, then all of them,
and in the end those that its segmentation token looks at.

Unit: a visual token of the decoder's sequence. A reconstruction from the abstract and reviews: there is no released
code, and no layer, number of tokens or default below is the authors'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt, Share
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.core.signals import Reading, Signal
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

CLASS = Reading("cls_row", -1, "tower")
INSTANCES = "instances"

# -- clustering: which tokens reason coarsely --------------------------------------------------------------------------


def uniform(prunable: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
    """Mask [B, N] of `count` [B, 1] of the prunable units [B, N], of which each sample has `tokens` [B, 1]: every
    floor(N / N_c)-th; what does not divide leaves the end of the image out."""
    number, step = prunable.long().cumsum(1) - 1, tokens // count.clamp_min(1)
    return prunable & (number % step.clamp_min(1) == 0) & (number < step * count)


def class_attention(cls_row: Tensor) -> Tensor:
    """Scores [B, N] of tokens by the attention [B, H, N] of the encoder's class token, mean over heads (assumption)."""
    return cls_row.mean(1)


def quotas(areas: Tensor, count: int) -> Tensor:
    """How many of `count` tokens each instance has, for areas [O]: its share, rounded down, and at least one."""
    return (count * areas / areas.sum().clamp_min(1)).floor().long().clamp_min(1)


def of_instances(masks: Tensor, count: int) -> Tensor:
    """Places [count] for the masks [O, N] of the instances in an image: from each as many as its quota, evenly spaced
    inside it (assumption), then evenly spaced ones of the image, until there are `count` (assumption)."""
    areas = masks.sum(1)
    places = [
        mask.nonzero().squeeze(1)[(torch.arange(quota) * area // quota).clamp(max=area - 1)]
        for mask, area, quota in zip(masks, areas.tolist(), quotas(areas, count).tolist(), strict=True)
        if area
    ]
    tokens = masks.shape[1]
    spread = (torch.arange(count) * tokens // max(count, 1)).to(masks.device)
    order = torch.cat([*places, spread, torch.arange(tokens, device=masks.device)])
    turn = torch.arange(len(order), device=order.device)
    first = order.new_full((tokens,), len(order)).scatter_reduce(0, order, turn, "amin")  # when each token comes
    return first.argsort()[:count]


# -- pruning: what the segmentation token looks at ---------------------------------------------------------------------


def segmentation_row(rows: Tensor, behind: int) -> Tensor:
    """Attention [B, N] of the segmentation token, `behind` tokens before the end of the text whose rows [B, H, R, N]
    these are; mean over heads (assumption)."""
    return rows[:, :, -1 - behind].mean(1)


@dataclass(frozen=True)
class LVLMCSP(TokenPruner):
    """LVLM_CSP (arXiv 2504.10854), a reconstruction: clustering, scattering, pruning.

    The budget is what the last stage keeps. Tokens that a layer leaves out pass by it, with no entry in its cache, and
    come back as they were.

    Parameters
    ----------
    fine : int, optional
        l1, the first layer that reads all tokens; None: a quarter of the depth.
    pruned : int, optional
        l2, the first layer that reads what the segmentation token looked at in the one before; None: half of the depth.
    coarse : float, optional
        The share of tokens that the layers before `fine` read; None: as many as the last stage keeps.
    design : {"uniform", "random", "class", "instances"}
        Which these are: evenly spaced ones, any, those that the encoder's class token
        attends to, or those of instances: the service `instances`, for each sample masks [O, N] over its visual tokens.
    behind : int
        Tokens of the prompt behind the segmentation token; 0: it is the last one. It has to stand in the prompt, as in
        a second pass over what was generated.
    """

    fine: PositiveInt | None = None
    pruned: PositiveInt | None = None
    coarse: Share | None = None
    design: Literal["uniform", "random", "class", "instances"] = "uniform"
    behind: NonNegativeInt = 0

    name: ClassVar[str] = "lvlm_csp"
    rest = "bypass"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fine and self.pruned and self.fine >= self.pruned:
            raise PrunelabError(f"{self.name}: the layers from fine={self.fine} to pruned={self.pruned} see all tokens")

    def stages(self, info: ModelInfo) -> tuple[int, int]:
        """l1 and l2 in a decoder of this depth."""
        # assumption: a quarter and a half, where one of them is given beside the other
        pruned = max(2, round(info.depth / 2)) if self.pruned is None else self.pruned
        return (min(max(1, round(info.depth / 4)), pruned - 1) if self.fine is None else self.fine), pruned

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        fine, pruned = self.stages(info)
        if fine >= pruned:
            raise PrunelabError(f"{self.name}: no layer sees all tokens between fine={fine} and pruned={pruned}")
        return [Site(layer, "input") for layer in (*range(fine), *range(pruned, max(info.depth, pruned + 1)))]

    def requires(self, site: Site) -> frozenset[Signal]:
        if site.layer:  # read at the first layer of the last stage alone
            return frozenset({Reading("attention", site.layer - 1, rows="text")})
        return frozenset({CLASS} if self.design == "class" else ())

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        _, pruned = self.stages(signals.info)
        if site.layer == 0:
            share = budget if self.coarse is None else Budget(self.coarse)
            signals.state["kept"] = self.clustering(signals, share)
        elif site.layer == pruned:
            signals.state["kept"] = self.looked_at(site, signals, budget)
        return Plan(signals.state["kept"], rest=self.rest)

    def looked_at(self, site: Site, signals: TokenSignals, budget: Budget) -> Gather:
        """The tokens that the segmentation token attends to in the layer before."""
        (reading,) = self.requires(site)
        assert isinstance(reading, Reading)
        rows = signals.at(reading).float()
        if rows.shape[2] <= self.behind:
            raise PrunelabError(
                f"{self.name}: {rows.shape[2]} tokens of text follow the image, so that the segmentation token cannot"
                f" stand {self.behind} before the end; let the prompt go on to it"
            )
        return signals.keep(budget, scores=segmentation_row(rows, self.behind))

    def clustering(self, signals: TokenSignals, budget: Budget) -> Gather:
        """The tokens of the first stage."""
        if self.design == "class":
            return signals.keep(budget, scores=class_attention(signals.at(CLASS).float()))
        prunable = signals.prunable
        if self.design == "random" or prunable.device.type == "meta":
            lots = torch.rand(prunable.shape, generator=signals.rng, device=prunable.device)
            return signals.keep(budget, scores=lots)
        available = signals.available()
        counts = [budget.count(n) for n in available]
        if self.design == "uniform":
            n, k = (torch.tensor(numbers, device=prunable.device).unsqueeze(1) for numbers in (available, counts))
            return signals.keep(budget, scores=uniform(prunable, n, k).float())
        order = [
            sample.nonzero().squeeze(1)[of_instances(masks.to(sample.device), count)]
            for sample, masks, count in zip(prunable, self.instances(signals), counts, strict=True)
        ]
        scores = torch.zeros_like(prunable, dtype=torch.float32)
        for sample, places in zip(scores, order, strict=True):
            sample[places] = 1.0
        return signals.keep(budget, scores=scores)

    def instances(self, signals: TokenSignals) -> list[Tensor]:
        """The service's masks [O, N] for each sample."""
        masks, available = signals.services.get(INSTANCES), signals.available()
        if masks is None:
            raise PrunelabError(f"{self.name}: design='instances' reads the service '{INSTANCES}'; pass it")
        given = [torch.as_tensor(own).bool() for own in masks]
        if [own.shape[-1] for own in given] != available or any(own.dim() != 2 for own in given):
            raise PrunelabError(
                f"{self.name}: the samples have {', '.join(map(str, available))} visual tokens; give '{INSTANCES}' one"
                " mask [instances, tokens] a sample"
            )
        return given
