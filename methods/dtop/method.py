"""Dynamic Token Pruning (Tang et al., ICCV 2023): easy tokens leave a segmentation network early, with their result.

A plain ViT with a head behind some blocks is a chain of stages. Behind a stage its head gives every token still there
a confidence in each class. Tokens it is sure of leave with that result (section 3.2); the most confident few of each
class found among them stay, so that what remains keeps a context of easy classes to attend to (section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

STAGES: Mapping[int, tuple[int, ...]] = {12: (5, 7), 24: (7, 15)}  # blocks of a ViT-B and a ViT-L with a head behind


# -- which tokens leave ----------------------------------------------------------------------------------------------


def representatives(confidence: Tensor, label: Tensor, sure: Tensor, classes: int, keep: int) -> Tensor:
    """Mask [B, N] of the `keep` most confident sure tokens of each class, all of them where a class has fewer.

    confidence [B, N] in the token's own class `label` [B, N]; only tokens in `sure` [B, N] count. Ties go to the
    earlier token.
    """
    order = selection.descending(confidence.masked_fill(~sure, -1))
    ordered = label.gather(1, order).unsqueeze(-1) == torch.arange(classes, device=label.device)
    ranked = (ordered & sure.gather(1, order).unsqueeze(-1)).long()  # [B, N, C]
    rank = (ranked.cumsum(1) * ranked).sum(-1)  # within its class from 1; 0 for tokens that are not sure
    return torch.zeros_like(sure).scatter(1, order, (rank > 0) & (rank <= keep))


def leaving(confidence: Tensor, active: Tensor, threshold: float, keep: int = 5, limit: Tensor | None = None) -> Tensor:
    """Mask [B, N] of the tokens that leave: those surer than `threshold`, but for the representatives of their class.

    confidence [B, N, C]; active [B, N] marks tokens that can leave at all. limit [B]: at most so many go on; where more
    would, the surest of the undecided leave too. At least one token goes on, the least confident.
    """
    best, label = confidence.float().max(-1)
    sure = active & (best > threshold)
    gone = sure & ~representatives(best, label, sure, confidence.shape[-1], keep)
    if limit is not None:
        spare = (active & ~gone).sum(1, keepdim=True) - limit.unsqueeze(1)
        gone |= _first(best, active & ~sure, spare)
    # assumption: the paper keeps 5 a class and so never empties an image; with keep=0 attention would have no key.
    last = (active & ~gone).sum(1, keepdim=True) == 0
    return gone & ~(_first(-best, active, torch.ones_like(last, dtype=torch.long)) & last)


def _first(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Mask [B, N] of the `count` [B, 1] best-scored tokens among those of a mask."""
    order = selection.descending(scores.masked_fill(~among, float("-inf")))
    chosen = torch.arange(scores.shape[1], device=scores.device) < count
    return torch.zeros_like(among).scatter(1, order, chosen) & among


# -- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DToP(TokenPruner):
    """DToP (arXiv 2308.01045).

    How many tokens leave follows from `threshold` and the image; the budget is an upper bound on what goes on at a
    site, reached by letting the surest of the other tokens leave. `Budget(1.0)` is the paper's method.

    Parameters
    ----------
    threshold : float
        Confidence p0 above which a token is done; 1 switches the method off. The released models use 0.9 (ViT-B) and
        0.95 (ViT-L) with ATM heads; the paper finds 0.98 best with SETR's.
    keep : int
        Tokens of each class that stay for context.
    layers : tuple of int, optional
        0-based blocks with a head to leave by, None for those of the published ViT-B and ViT-L.
    """

    threshold: NonNegativeFloat = 0.95
    keep: NonNegativeInt = 5
    layers: tuple[NonNegativeInt, ...] | None = None

    name: ClassVar[str] = "dtop"
    rest = "halt"
    adaptive = True
    exempt = {
        "keep_all": "a threshold decides, not the budget: sure tokens leave under any budget",
        "budget": "the budget is an upper bound: fewer tokens go on where the network is sure of more",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if self.layers is None and info.depth not in STAGES:
            known = " and ".join(map(str, STAGES))
            raise PrunelabError(
                f"dtop knows its blocks for {known} blocks only, this model has {info.depth}; set layers"
            )
        return [Site(layer, "block_output") for layer in (STAGES[info.depth] if self.layers is None else self.layers)]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"class_confidence"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        confidence, active = signals.class_confidence, signals.prunable
        limit = None
        if budget != Budget(1.0) and active.device.type != "meta":
            limit = torch.tensor([budget.count(n) for n in active.sum(1).tolist()], device=active.device)
        gone = leaving(confidence, active, self.threshold, self.keep, limit)
        return Plan(signals.keep(mask=~gone), rest=self.rest)
