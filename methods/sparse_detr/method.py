"""Sparse DETR (Roh et al., ICLR 2022): the encoder updates the tokens that the decoder is expected to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site
from prunelab.common.core.selection import descending, keep_first
from prunelab.common.tokens.detr import TokenScorer, attention_map
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals


@dataclass(frozen=True)
class Scored:
    """Of one forward pass: logits [B, N] with their gradients, valid [B, N] or None, the level shapes (h, w), and how
    many tokens of each image were kept."""

    logits: Tensor
    valid: Tensor | None
    shapes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]


class SparseParts(nn.Module):
    """The scoring network, one for all levels. While training, `scored` is what `saliency_loss` needs of the last
    forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scorer = TokenScorer(width)
        self.scored: Scored | None = None

    def forward(self, memory: Tensor) -> Tensor:
        """[B, N, D] -> [B, N]."""
        return self.scorer(memory)


def kept_counts(budget: Budget, valid: Sequence[int]) -> list[int]:
    """Tokens updated in each image, of its `valid` ones: the ratio rounded down and one more (as released)."""
    return [max(1, min(budget.count(n) + (budget.unit == "ratio"), n)) for n in valid]


def choose(ranking: Tensor, counts: Sequence[int]) -> Gather:
    """The first `counts` of each row of a ranking [B, N], in their original order."""
    if min(counts) == max(counts):
        return Gather(ranking[:, : counts[0]].sort(-1).values)
    return keep_first(ranking, torch.tensor(counts, device=ranking.device))


def saliency_loss(parts: SparseParts, seen: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Binary cross-entropy of the scores of the last forward pass against the tokens that the decoder looked at most,
    as many of them as were kept (equation 4).

    seen: what `prunelab.common.tokens.detr.decoder_attention` recorded of that pass.
    """
    if parts.scored is None or not seen:
        raise PrunelabError("there is nothing to learn from; train with the method applied, inside decoder_attention")
    scored = parts.scored
    received = torch.stack([attention_map(places, weights, scored.shapes) for places, weights in seen]).sum(0)
    if scored.valid is not None:
        received = received.masked_fill(~scored.valid, -1.0)
    counts = torch.tensor(scored.counts, device=received.device).unsqueeze(1)
    best = torch.arange(received.shape[1], device=received.device) < counts
    wanted = torch.zeros_like(scored.logits).scatter(1, descending(received), best.to(scored.logits.dtype))
    return functional.multilabel_soft_margin_loss(scored.logits, wanted)


@dataclass(frozen=True)
class SparseDETR(TokenPruner):
    """Sparse DETR (arXiv 2111.14330). Its natural budget is `Budget(0.1)` to `Budget(0.5)`: the share of an image's
    tokens that every encoder layer updates, the same ones in all of them.

    Parameters
    ----------
    criterion : {"learned", "proposal", "class"}
        `learned` scores tokens by the paper's network and needs its parts; two training-free stand-ins run on any
        detector: `proposal` scores by a two-stage detector's own first stage, `class` by its class head.
    """

    criterion: Literal["learned", "proposal", "class"] = "learned"

    name: ClassVar[str] = "sparse_detr"
    rest = "bypass"
    exempt = {
        "budget": "one token more than the ratio says (released)",
        "padding": "the scorer's mean runs over padding (released)",
    }

    def build(self, info: ModelInfo) -> SparseParts | None:
        return SparseParts(info.width) if self.criterion == "learned" else None

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "input") for layer in range(info.depth)]

    def requires(self, site: Site) -> frozenset[str]:
        signal = "encoder_memory" if self.criterion == "learned" else f"{self.criterion}_logits"
        return frozenset({signal}) if site.layer == 0 else frozenset()

    def score(self, site: Site, signals: TokenSignals) -> Tensor:
        """Saliency logits [B, N] of the features before the encoder."""
        if self.criterion != "learned":
            return getattr(signals, f"{self.criterion}_logits").amax(-1)
        with torch.set_grad_enabled(signals.parts.training):  # plans are made without gradients; the scorer learns
            return signals.parts(signals.encoder_memory)

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        state, valid = signals.state, signals.valid
        if site.layer == 0:  # the choice is made once and holds for all layers
            scores = self.score(site, signals)
            padded = scores if valid is None else scores.masked_fill(~valid, float("-inf"))
            ranking = descending(padded.detach())
            available = [signals.units] * len(scores) if valid is None else valid.sum(1).tolist()
            counts = kept_counts(budget, available)
            if self.criterion == "learned":
                learning = Scored(scores, valid, signals.grids, tuple(counts))
                signals.parts.scored = learning if signals.parts.training else None
            state["kept"] = choose(ranking, counts)
        return Plan(state["kept"], rest=self.rest)
