"""Exploring Token Pruning in Vision State Space Models (Zhan et al., NeurIPS 2024): ToP-ViM.

A vision Mamba reads an image as a sequence, so removing tokens changes how far apart the others are. Tokens are judged
by what the scans put out for them, and the scans behind a pruning layer are told where tokens are missing: hidden
states are aligned with the sequence as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Positions, Site
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Metric = Literal["clip", "none", "l1", "l2"]


def importance(scans: Tensor, metric: Metric = "clip") -> Tensor:
    """Importance [B, N] of every token from the outputs of all scans [B, S, N, E], in token order.

    `clip` is the paper's: the sum over channels of max(0, y). The others are those of its ablation: the plain sum, the
    L1 and the L2 norm over the channels. Directions add up.
    """
    if metric == "l2":
        return scans.norm(dim=-1).sum(1)
    return {"clip": scans.relu, "none": lambda: scans, "l1": scans.abs}[metric]().sum((1, 3))


def kept(budget: Budget, units: int) -> int:
    """Units that stay: a share is rounded up, after six decimals, as single precision stores 0.7 as 0.69999999."""
    if budget.unit != "ratio":
        return budget.count(units)
    return math.ceil(round(budget.amounts[0] * units, 6))


# -- the released code -----------------------------------------------------------------------------------------------


def released_importance(scans: Tensor) -> Tensor:
    """Importance [B, N] as released: the plain sum over channels of the backward scan alone, in the order of the scan,
    so that token i is judged by token N - 1 - i."""
    return scans[:, -1].flip(1).sum(-1)


def released_choice(scores: Tensor, budget: Budget) -> Gather:
    """What stays as released, of scores [B, N] with the class token at N // 2.

    The number of tokens, class token included, is rounded up and made odd. The class token goes to the middle of the
    kept ones, so that tokens from its left may come to stand on its right. Only in the first sample is it kept out of
    the ranking; elsewhere it may be chosen a second time, as a patch.
    """
    total = scores.shape[1]
    middle = total // 2
    tokens = kept(budget, total - 1)
    patches = tokens - tokens % 2
    scores = scores.clone()
    scores[0, middle] = -torch.inf
    chosen, _ = selection.top_k(scores, patches)
    class_token = chosen.new_full((len(chosen), 1), middle)
    return Gather(torch.cat([chosen[:, : patches // 2], class_token, chosen[:, patches // 2 :]], 1))


# -- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VimTokenPruning(TokenPruner):
    """ToP-ViM (arXiv 2409.18962): token pruning by the clipped outputs of the scans, with hidden states aligned to the
    full sequence.

    Parameters
    ----------
    layers : tuple of int
        0-based layers with a pruning step behind them, by default the released schedule of Vim-S (behind its 5th, 10th
        and 15th block); shares multiply from one to the next.
    metric : {"clip", "none", "l1", "l2"}
        What of the scans' outputs counts.
    align : {"decay", "hold", "original", "renumber"}
        What a scan does where tokens are missing: `decay` lets its state decay as long as it would have, `hold` copies
        it (in Vim that is plain removal), `original` copies it and lets the causal convolution see tokens at their old
        places, `renumber` closes the sequence up as if the others had never been.
    released : bool
        The authors' published code instead, whose metric and plain removal replace the two options above.
    """

    layers: tuple[NonNegativeInt, ...] = (4, 9, 14)
    metric: Metric = "clip"
    # assumption: that the state decays, with the step width of the token kept before, is our reading; see README
    align: Positions = "decay"
    released: bool = False

    name: ClassVar[str] = "vim_token_pruning"
    exempt = {
        "budget": "the number kept is rounded up, as in the paper",
        "padding": "scans have no padding; padded samples are refused",
    }

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        if self.released and not info.class_index:
            raise PrunelabError(f"{self.name}: the released code needs a class token in the middle; leave released out")
        return [Site(layer, "block_output") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"scans"})

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        signals.one_length(self.name)
        if self.released:
            return Plan(released_choice(released_importance(signals.scans), budget), positions="renumber")
        # assumption: scans' outputs count after the gate, as in the authors' code; the paper says "SSM output"
        scores = importance(signals.scans, self.metric)
        choice = signals.keep(Budget(kept(budget, signals.units), "count"), scores=scores)
        return Plan(choice, positions=self.align)
