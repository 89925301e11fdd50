"""GAPrune (Tang & Yang, 2025): prune an embedding model for one domain, by two corpora's gradients.

A weight is worth what the domain's Fisher information says of it beyond the general corpus's, a little more where both
corpora's gradients agree, and something for its size.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, NonNegativeFloat, PositiveInt, Share
from prunelab.common.weights import masks
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Accumulator, Probe, Statistics, Target, WeightSignals

Post = Literal["none", "zscore_sigmoid", "minmax", "rank"]
Layers = Literal["mlp", "attention"]
TINY = 1e-8


def unit(gradient: Tensor) -> Tensor:
    """The gradient over its norm, and a little more as released: gradients of large models are small; one whose norm
    is no more than that is nothing."""
    norm = gradient.norm()
    return torch.where(norm > TINY, gradient / (norm + TINY), 0.0)


def alignment(general: Tensor, domain: Tensor) -> Tensor:
    """Cosine of the two gradients of a weight, 0 where one is next to nothing."""
    return (unit(general) * unit(domain)).sum()


def local_alignment(general: Tensor, domain: Tensor) -> Tensor:
    """The same for every weight: the product of the unit gradients, of matrices averaged over 3 x 3 neighbours with
    zeros around. As released, matrices of two rows or columns have smaller windows, but the same zeros around, so that
    the result is larger than the weight; those of one have none."""
    one, other = unit(general), unit(domain)
    product = one * other
    if product.dim() < 2 or not (bool(one.any()) and bool(other.any())):
        return product
    window = min(3, *product.shape)
    return F.avg_pool2d(product[None, None], window, stride=1, padding=window // 2)[0, 0]


def dai(
    weight: Tensor, domain: Tensor, general: Tensor, aligned: Tensor, beta: float, gamma: float, spread: float = 0.2
) -> Tensor:
    """Domain alignment importance: softplus of (F_dom |w| - beta F_gen |w|) (1 + 0.2 s) + gamma sqrt |w|, with the
    factor between 0.8 and 1.2. Where all scores of a weight are about the same, sizes tell them apart."""
    size = weight.abs()
    gain = (1 + spread * aligned).clamp(1 - spread, 1 + spread)
    score = F.softplus((domain * size - beta * general * size) * gain + gamma * (size + TINY).sqrt())
    if float(score.std()) < 1e-6:
        score = score * (0.5 + 0.5 * size / (size.mean() + TINY))
    return score


def processed(score: Tensor, how: Post, temperature: float = 1.0) -> Tensor:
    """Scores of one weight on a common scale. As released, a temperature of 0 counts 1, and one below it next to 0."""
    if how == "zscore_sigmoid":
        return torch.sigmoid((score - score.mean()) / (score.std() + TINY) / max(temperature or 1.0, 1e-6))
    if how == "minmax":
        return (score - score.min()) / (score.max() - score.min() + TINY)
    if how == "rank":
        places = score.flatten().argsort().argsort().to(score)
        return ((places + 1) / len(places)).view_as(score)
    return score


def spread_out(total: int, sizes: Sequence[int], least: float = 0.05, most: float = 0.95) -> list[int]:
    """`total` weights to remove shared out over layers of these sizes, in proportion; of what rounding leaves the
    largest get one each. No layer gives less than the share `least` or more than `most`, so that the total may
    differ."""
    whole = sum(sizes)
    results = [int(size / whole * total) for size in sizes]
    for place in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[: total - sum(results)]:
        results[place] += 1
    return [min(max(n, int(least * size)), int(most * size)) for n, size in zip(results, sizes, strict=True)]


def smallest(scores: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """Masks of what stays when the `count` smallest scores of all go, but for one."""
    return masks.Leaving(scores, min(count, sum(s.numel() for s in scores) - 1))


class Fisher(Accumulator):
    """Squared gradients of micro-batches, summed, over the number of samples, and a little more."""

    def __init__(self, samples: int) -> None:
        self.samples, self.sum = samples, torch.zeros(())

    def update(self, observed: Tensor) -> None:
        self.sum = self.sum.to(observed.device) + observed.float().square()

    def value(self) -> Tensor:
        return self.sum / max(self.samples, 1) + TINY


class Mean(Accumulator):
    """The gradient, averaged over micro-batches."""

    def __init__(self, target: Target) -> None:
        self.seen, self.sum = 0, torch.zeros(())

    def update(self, observed: Tensor) -> None:
        self.seen, self.sum = self.seen + 1, self.sum.to(observed.device) + observed.float()

    def value(self) -> Tensor:
        return self.sum / max(self.seen, 1)


@dataclass(frozen=True)
class GAPrune(WeightPruner):
    """One-shot pruning of single weights for a domain, by Fisher information and agreement of gradients of two corpora
    (arXiv 2509.10844).

    Calibrate with the corpora `domain` and `general`, triplets of `query`, `positive` and `negative` sequences for
    `objective="contrastive"`, the authors', or whatever the objective reads.

    Parameters
    ----------
    beta
        How much the general corpus's Fisher information counts against the domain's.
    gamma
        Weight of a weight's size: 0.5 on the authors' command line, 0.3 in their function.
    spread
        How far agreement of gradients moves a score (0.2).
    post, temperature
        Scale on which each weight matrix's scores are put; the latter of `zscore_sigmoid`.
    fusion_alpha, fusion_beta
        Score = alpha F_dom |w| + beta score, where these are not 0 and 1. As released, a beta of 0 counts 1.
    strategy
        `global` compares all weights, `uniform` takes about the same share of every layer.
    least, most
        Shares that `uniform` takes of a layer at least and at most.
    layers
        What is pruned: `mlp`, `attention`.
    batch
        Samples of a micro-batch, among which positives and negatives are shared.
    """

    beta: NonNegativeFloat = 1.0
    gamma: NonNegativeFloat = 0.5
    spread: NonNegativeFloat = 0.2
    post: Post = "none"
    temperature: FiniteFloat = 1.0
    fusion_alpha: FiniteFloat = 0.0
    fusion_beta: FiniteFloat = 1.0
    strategy: Literal["global", "uniform"] = "global"
    least: Share = 0.05
    most: Share = 0.95
    layers: tuple[Layers, ...] = ("mlp",)
    batch: PositiveInt = 8

    name: ClassVar[str] = "gaprune"
    corpora = ("domain", "general")
    forgets = True
    exempt = {"budget": "weights of all layers are compared"}

    @property
    def sequential(self) -> bool:
        return False

    def covers(self, target: Target) -> bool:
        return ("attention" if "attn" in target.role or "attention" in target.role else "mlp") in self.layers

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        by_corpus = []
        for corpus in self.corpora:
            count = len(probe.corpora[corpus].items) if corpus in probe.corpora else 0
            wanted = {f"fisher_{corpus}": lambda target, n=count: Fisher(n), f"gradient_{corpus}": Mean}
            by_corpus.append(probe.gradients(wanted, corpus=corpus, batch=self.batch))  # type: ignore[arg-type]
        # Nothing is read here: in a folder all of it stays there until a target is scored.
        return {target.name: ChainMap(*(of[target.name] for of in by_corpus)) for target in probe.targets}  # type: ignore[arg-type]

    @staticmethod
    def aligned(statistics: Mapping[str, Tensor]) -> Tensor:
        """How far the two corpora's gradients of a weight agree, by weight where its shape lets them be smoothed."""
        general, domain = statistics["gradient_general"], statistics["gradient_domain"]
        local = local_alignment(general, domain)
        return local if local.shape == general.shape else alignment(general, domain).expand_as(general)

    def raw(self, weight: Tensor, domain: Tensor, general: Tensor, aligned: Tensor) -> Tensor:
        """The importance of a matrix's weights before it is put on another scale."""
        return dai(weight, domain, general, aligned, self.beta, self.gamma, self.spread)

    def fused(self, score: Tensor, weight: Tensor, domain: Tensor) -> Tensor:
        """The score on its scale, with the domain's Fisher information once more where that is asked for."""
        score, beta = processed(score, self.post, self.temperature), self.fusion_beta or 1.0
        if self.fusion_alpha == 0 and beta == 1:
            return score
        return self.fusion_alpha * domain * weight.abs() + beta * score

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        weight, domain = signals.weight.float(), signals["fisher_domain"]
        raw = self.raw(weight, domain, signals["fisher_general"], self.aligned(signals.statistics))
        return self.fused(raw, weight, domain)

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        if budget.unit != "ratio" or len(budget.amounts) > 1:
            raise PrunelabError(f"gaprune prunes one share of all weights together, such as 0.5, not {budget}")
        gone = int(round(sum(target.units for target in targets) * (1 - budget.amounts[0]), 6))
        if self.strategy == "global" or not gone:
            return smallest(scores, gone)
        return self.uniformly([target.block for target in targets], scores, gone)

    def uniformly(self, blocks: Sequence[int], scores: Sequence[Tensor], gone: int) -> list[Tensor]:
        """The smallest of each layer, as many as are its share."""
        layers: dict[int, list[int]] = {}
        for place, block in enumerate(blocks):
            layers.setdefault(block, []).append(place)
        sizes = [sum(scores[i].numel() for i in places) for places in layers.values()]
        counts = spread_out(gone, sizes, self.least, self.most)
        results: dict[int, Tensor] = {}
        for count, places in zip(counts, layers.values(), strict=True):
            results |= dict(zip(places, smallest([scores[i] for i in places], count), strict=True))
        return [results[i] for i in range(len(scores))]
