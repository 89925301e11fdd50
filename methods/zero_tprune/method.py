"""Zero-TPrune (Wang et al., CVPR 2024): zero-shot token pruning on the attention graph.

A pruning layer reads the attention of its block as a directed graph: an edge i -> j of weight A[i, j] is a vote of
token i for token j. Weighted Page Rank turns votes into importance (section 3.2); the S-stage then drops tokens
that are near copies of more important ones (section 3.3), and the I-stage the least important of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, Share
from prunelab.common.core.plan import ModelInfo, Plan, Site, take
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import TokenSignals

Partition = Literal["sequential-U", "sequential-I", "alternating", "random", "none"]
Feature = Literal["keys", "queries", "values", "hidden"]
Metric = Literal["cosine", "dot", "l1", "l2"]


# -- scoring ---------------------------------------------------------------------------------------------------------


def transition(logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Attention logits [B, H, N, N] as the graph's row-stochastic matrix; `mask` [B, N] takes tokens out of it."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return (logits if mask is None else logits.masked_fill(~mask[:, None, None, :], float("-inf"))).softmax(-1)


def start(attention: Tensor, cls_weight: float = 1.0) -> Tensor:
    """Initial scores [B, H, N], summing to 1; the class token starts with `cls_weight` times the share of others."""
    scores = attention.new_ones(attention.shape[:-1])
    scores[..., 0] = cls_weight
    return scores / scores.sum(-1, keepdim=True)


def page_rank(
    attention: Tensor, scores: Tensor, iterations: int, damping: float = 0.0, alive: Tensor | None = None
) -> Tensor:
    """Weighted Page Rank (Algorithm 1): s <- A^T s, with an optional uniform jump.

    attention [..., N, N], scores [..., N]. `alive` [..., N] bool restricts the graph to those tokens with rows
    renormalised, without building the smaller matrix.
    """
    units = scores.shape[-1]
    reach = None
    if alive is not None:  # assumption: rows of the sub-graph are renormalised (the paper does not say)
        live = alive.to(attention.dtype)
        reach = live / (live.unsqueeze(-2) @ attention.transpose(-2, -1)).squeeze(-2).clamp_min(1e-12)
        scores = scores * live

    def vote(s: Tensor) -> Tensor:
        s = ((s if reach is None else s * reach).unsqueeze(-2) @ attention).squeeze(-2)
        s = s if reach is None else s * live
        return s if damping == 0 else s * (1 - damping) + damping / units

    return selection.power_iteration(vote, scores, iterations)


def combine_heads(
    scores: Tensor,
    mode: Literal["rms", "mean"],
    variance_range: tuple[NonNegativeFloat, NonNegativeFloat] | None = None,
    alive: Tensor | None = None,
) -> Tensor:
    """Scores [B, H, n] of patches -> [B, n]. `rms` is the paper's emphasis of informative regions (eq. 4); heads
    whose variance over the patches `alive` [B, n] lies outside `variance_range` have no say (the variance-based
    head filter, eq. 5)."""
    weight = torch.ones_like(scores[..., :1])
    if variance_range is not None:
        # assumption: scores are scaled to mean 1 over the patches, as no head of 196 tokens summing to 1 could
        # have a variance of 0.01; and all heads vote where none passes.
        live = torch.ones_like(scores) if alive is None else alive[:, None].to(scores.dtype).expand_as(scores)
        count = live.sum(-1, keepdim=True)
        scaled = scores * live * count / (scores * live).sum(-1, keepdim=True).clamp_min(1e-30)
        variance = ((scaled - 1).square() * live).sum(-1, keepdim=True) / count
        passes = (variance >= variance_range[0]) & (variance <= variance_range[1])
        weight = torch.where(passes.any(1, keepdim=True), passes, True).to(scores.dtype)
    power = 2 if mode == "rms" else 1
    mean = (scores.pow(power) * weight).sum(1) / weight.sum(1)
    return mean.sqrt() if mode == "rms" else mean


# -- S-stage ---------------------------------------------------------------------------------------------------------


def similarity(left: Tensor, right: Tensor, metric: Metric) -> Tensor:
    """Pairwise similarity [B, M, K] of features [B, M, D] and [B, K, D], larger is closer."""
    if metric == "cosine":
        left, right = (torch.nn.functional.normalize(x, dim=-1) for x in (left, right))
    if metric in ("cosine", "dot"):
        return left @ right.transpose(1, 2)
    return -torch.cdist(left, right, p=1.0 if metric == "l1" else 2.0)


def similar_units(
    importance: Tensor,
    features: Tensor,
    removed: int,
    partition: Partition = "sequential-U",
    metric: Metric = "cosine",
    rng: torch.Generator | None = None,
) -> Tensor:
    """Mask [B, n] of the `removed` patches most similar to a patch of the other group (section 3.3).

    importance [B, n], features [B, n, D]. Patches are sorted by importance and split: `sequential-U` prunes from
    the less important half, `sequential-I` from the more important one, `alternating` by parity of rank,
    `random` by lot; `none` compares each patch with all more important ones.
    """
    batch, units = importance.shape
    order = selection.descending(importance)
    half = units // 2  # the kept group where n is odd, as in the peers' re-implementation
    if partition == "none":
        ranked = take(features, order)
        later = torch.ones(units, units, dtype=torch.bool, device=features.device).tril(-1)
        best = similarity(ranked, ranked, metric).masked_fill(~later, float("-inf")).amax(-1)
        candidates = order
    else:
        if partition == "random":
            lot = torch.rand(batch, units, generator=rng, device=importance.device)
            order = order.gather(1, lot.argsort(1))
        if partition == "alternating":
            kept, candidates = order[:, 1::2], order[:, ::2]
        elif partition == "sequential-I":
            kept, candidates = order[:, units - half :], order[:, : units - half]
        else:
            kept, candidates = order[:, :half], order[:, half:]
        best = (
            similarity(take(features, candidates), take(features, kept), metric).amax(-1)
            if half
            else importance.new_zeros(batch, units)
        )
    gone = candidates.gather(1, selection.descending(best)[:, :removed])
    return torch.zeros_like(importance, dtype=torch.bool).scatter(1, gone, True)


# -- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZeroTPrune(TokenPruner):
    """Zero-TPrune (arXiv 2305.17328) with the paper's settings; the authors' early code base is reached through the
    options.

    Parameters
    ----------
    layers : tuple of int
        0-based blocks with a pruning layer behind them. A budget of rates (.9, .8, .7) keeps that share of the patches
        at each.
    similar : float
        Share of the patches to be removed that the S-stage removes.
    iterations : tuple of int, optional
        Votes a site, None for the paper's schedule by depth.
    cls_init : bool
        Whether the class token starts with more of the importance; False gives Zero-TPrune-uni.
    heads : {"rms", "mean", "mean-logits"}
        How heads are joined: emphasised (eq. 4), averaged, or averaged before the softmax.
    variance_range : (float, float), optional
        Heads whose variance lies outside have no say (eq. 5).
    partition : {"sequential-U", "sequential-I", "alternating", "random", "none"}
        How the S-stage splits the patches, see `similar_units`.
    feature : {"keys", "queries", "values", "hidden"}
        What the S-stage compares.
    metric : {"cosine", "dot", "l1", "l2"}
        By what.
    temperature, damping : float
        Of the graph's softmax, and of the votes.
    """

    layers: tuple[NonNegativeInt, ...] = (2, 5, 8)
    similar: Share = 0.25  # assumption: the paper searched it per layer; a moderate share, not tuned
    iterations: tuple[NonNegativeInt, ...] | None = None
    cls_init: bool = True
    heads: Literal["rms", "mean", "mean-logits"] = "rms"
    variance_range: tuple[NonNegativeFloat, NonNegativeFloat] | None = (0.01, 0.7)
    partition: Partition = "sequential-U"
    feature: Feature = "keys"
    metric: Metric = "cosine"
    temperature: PositiveFloat = 1.0
    damping: Share = 0.0

    name: ClassVar[str] = "zero_tprune"
    exempt = {"padding": "the two halves of the S-stage and the votes count one graph size; padded samples are refused"}

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return [Site(layer, "block_output") for layer in self.layers]

    def requires(self, site: Site) -> frozenset[str]:
        plain = self.temperature == 1 and self.heads != "mean-logits"
        return frozenset(
            {"attention" if plain else "attention_logits"} | ({self.feature} if self.similar > 0 else set())
        )

    def votes(self, site: Site, info: ModelInfo) -> int:
        """Iterations at a site: 30 in the first three layers, 5 in the middle, 1 in the last three (section 3.2)."""
        if self.iterations is not None:
            if site.index >= len(self.iterations):
                raise PrunelabError("zero_tprune: give one number of iterations for each of its layers")
            return self.iterations[site.index]
        return 30 if site.layer < 3 else 1 if site.layer >= info.depth - 3 else 5

    def plan(self, site: Site, signals: TokenSignals, budget: Budget) -> Plan:
        """The I'-S-I order: one vote for ranks, drop near copies, rank the surviving graph, drop the rest."""
        signals.one_length(self.name)
        special, units = signals.prunable.shape[1] - signals.units, signals.units
        keep = budget.count(units)
        attention = self.graph(signals)
        cls_weight = attention.shape[-1] ** 0.5 if self.cls_init and signals.info.class_token else 1.0
        initial = start(attention, cls_weight)

        alive = None
        removed = min(int(round(self.similar * (units - keep), 6)), units - units // 2)
        if removed > 0:
            ranks = self.importance(page_rank(attention, initial, 1, self.damping)[..., special:])
            gone = similar_units(
                ranks, self.features(signals)[:, special:], removed, self.partition, self.metric, signals.rng
            )
            alive = torch.cat([gone.new_ones(gone.shape[0], special), ~gone], 1)
        scores = page_rank(
            attention, initial, self.votes(site, signals.info), self.damping, None if alive is None else alive[:, None]
        )
        importance = self.importance(scores[..., special:], alive if alive is None else alive[:, special:])
        full = torch.nn.functional.pad(importance, (special, 0))
        return Plan(signals.keep(budget, scores=full))

    def graph(self, signals: TokenSignals) -> Tensor:
        """The attention graph [B, H, N, N]; the paper's is the block's own attention."""
        if "attention" in self.requires(Site(0)):
            return signals.attention.float()
        logits = signals.attention_logits
        return transition(logits.mean(1, keepdim=True) if self.heads == "mean-logits" else logits, self.temperature)

    def importance(self, scores: Tensor, alive: Tensor | None = None) -> Tensor:
        """Head scores [B, H, n] of patches -> importance [B, n]; dropped patches come last."""
        combined = combine_heads(scores, "mean" if self.heads == "mean" else "rms", self.variance_range, alive)
        return combined if alive is None else combined.masked_fill(~alive, -1.0)

    def features(self, signals: TokenSignals) -> Tensor:
        """Features [B, N, D] that the S-stage compares; heads side by side."""
        features = getattr(signals, self.feature)
        # assumption: heads are concatenated (the paper says "key matrix" only)
        return (features if features.dim() == 3 else features.transpose(1, 2).flatten(2)).float()
