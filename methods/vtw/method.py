"""VTW (Lin et al., AAAI 2025): behind some layer the text has taken in what the image says, and the image can go.

Unit: a visual token of the decoder's sequence. All of them leave together, before layer K, so nothing is ranked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import ModelInfo, Plan, Positions, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


def divergence(full: Tensor, withdrawn: Tensor) -> Tensor:
    """KL(withdrawn || full) [...] of two predictions of the next word, for logits [..., V] of the model that sees the
    image throughout and of the one that does not (eq. 6, with its arguments in the order of the released code)."""
    student, teacher = withdrawn.log_softmax(-1), full.log_softmax(-1)
    return nn.functional.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


def first_layer(full: Tensor, withdrawn: Iterable[Tensor], eta: float = 0.003, first: int = 5) -> int:
    """The search for K: the first layer from which the image may be missing, so that the mean divergence over samples
    is at most eta.

    Parameters
    ----------
    full : Tensor
        Logits [n, V] of the next word of n prompts, the image seen throughout.
    withdrawn : iterable of Tensor
        The same when it is withdrawn before layer `first`, `first` + 1, ...; no more of them are asked for than needed.
    eta : float
        Released: 0.003 for LLaVA-1.5-7B and by default, 0.0005 for the 13B, 0.0001 for LLaVA-NeXT-7B of Vicuna.
    """
    for layer, logits in enumerate(withdrawn, first):
        if float(divergence(full, logits).mean()) <= eta:
            return layer
    raise PrunelabError(f"vtw: without its image no layer stays within eta={eta:g}; give a larger one")


@dataclass(frozen=True)
class VTW(TokenPruner):
    """VTW (arXiv 2405.05803): withdraws all visual tokens before layer K.

    The budget is the share of the visual tokens (or their number) that a layer sees in the mean over layers, so that K
    is that share of the depth, rounded: 192, 128 and 64 of 576 are K = 11, 7 and 4 of 32.

    Parameters
    ----------
    layer : int, optional
        K itself, the first layer, from 0, that sees no visual token; the budget is then 0. 15 and 16 for LLaVA-1.5-7B.
    positions : str
        The text keeps its position numbers, as released, or is numbered anew.
    """

    layer: NonNegativeInt | None = None
    positions: Positions = "original"

    name: ClassVar[str] = "vtw"
    exempt = {"budget": "a layer sees all visual tokens or none; the budget is the mean over layers"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if info.grid is not None and info.tokens == math.prod(info.grid):
            raise PrunelabError(f"{self.name}: this model has no other token than its patches, which all leave")
        return [Site(layer, "input") for layer in (range(info.depth) if self.layer is None else [self.layer])]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset()

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        units = max(signals.units, 1)
        if self.layer is None:
            share = budget.amounts[0] if budget.unit == "ratio" else budget.count(units) / units
            stays = site.layer < round(share * signals.info.depth)
        elif budget.count(units):
            raise PrunelabError(f"{self.name}: no visual token goes on behind `layer`; give the budget 0, or no layer")
        else:
            stays = False
        none = torch.zeros_like(signals.prunable, dtype=torch.float32)
        return Plan(signals.keep(Budget(float(stays)), scores=none), positions=self.positions)
