"""ECoFLaP (Sung et al., ICLR 2024): first how much of each block, from the whole model's loss; then which weights.

The coarse step perturbs one weight matrix at a time and sees how far the loss moves, which takes forward passes alone.
Blocks keep weights in proportion to what that says of them. The fine step is a layer-wise pruner, Wanda or SparseGPT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveFloat, PositiveInt, PositiveShare, Share
from prunelab.common.weights import masks
from prunelab.common.weights.obs import inverse_factors, prune_matrix
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.statistics import InputNorm
from prunelab.common.weights.targets import Accumulator, Decision, Probe, Statistics, Target, Unit, WeightSignals

Score = Literal["zeroth", "zeroth_magnitude", "zeroth_square", "gradient", "magnitude", "square"]
SEEDS = 10**9


def slope(weight: Tensor, loss: Callable[[], Tensor], seed: int, epsilon: float) -> float:
    """|L(W + e z) - L(W - e z)| / 2 e along a direction z that the seed draws (Eq. 4). weight is the model's own: it is
    moved in place and, as released, moved back, so that it comes back up to rounding."""
    z = torch.normal(0.0, 1.0, weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    losses = []
    for step in (1, -2):
        weight += step * epsilon * z
        losses.append(loss())
    weight += epsilon * z
    return float((losses[0] - losses[1]).abs()) / (2 * epsilon)


def importance(score: Score, weight: Tensor, slopes: Sequence[float] = (), gradient: Tensor | None = None) -> Tensor:
    """Importance, whose sum is that of the matrix: of the slopes' sum alone, a scalar, or times |W| or, squared, W^2;
    likewise of the mean |gradient|, or for `square` the mean squared gradient."""
    if gradient is not None:
        weight = weight.float()
        return {"gradient": gradient, "magnitude": weight.abs() * gradient, "square": weight**2 * gradient}[score]
    total = sum(slopes)
    if score == "zeroth":
        return torch.tensor(total)
    return weight.float().abs() * total if score == "zeroth_magnitude" else weight.float() ** 2 * total**2


def shared_out(scores: Tensor, sizes: Tensor, keep: int, most: float) -> Tensor:
    """Sparsity [G] of every group, from importance [G] and numbers of weights [G]: `keep` weights of all stay, none
    gives more than the share `most`, and what is beyond that is kept in proportion to importance (algorithm 1).

    As released, shares are rounded up in single precision, and what that takes too much is taken once more; unless the
    least that groups keep is enough already.
    """
    scores, sizes = scores.float().clone(), sizes.long()
    kept, least = (sizes * (1 - most)).ceil().long(), (sizes * (1 - most)).long()
    short = int(kept.sum()) < keep
    while int(kept.sum()) < keep:
        missing, before = keep - int(kept.sum()), kept.clone()
        if float(scores.sum()) > 0:
            kept = kept + (scores / scores.sum() * missing).ceil().long()
        scores[kept >= sizes] = 0
        kept = torch.minimum(kept, sizes)
        if torch.equal(kept, before):
            for group in range(len(kept)):  # those without importance get the rest
                more = min(int(sizes[group] - kept[group]), keep - int(kept.sum()))
                kept[group] += more
            break
    excess = int(kept.sum()) - keep if short else 0
    for group in kept.argsort(descending=True).tolist() if excess > 0 else ():
        more = min(excess, int(kept[group] - least[group]))
        kept[group] += more
        excess -= more
    return (1 - kept / sizes).clamp(0, 1)


class MeanGradient(Accumulator):
    """Mean over batches of a gradient's size, or of its square."""

    def __init__(self, square: bool) -> None:
        self.square, self.seen = square, 0
        self.sum = torch.zeros(())

    def update(self, observed: Tensor) -> None:
        result = observed.float()
        self.sum = self.sum.to(result.device) + (result.square() if self.square else result.abs())
        self.seen += 1

    def value(self) -> Tensor:
        return self.sum / max(self.seen, 1)


@dataclass(frozen=True)
class ECoFLaP(WeightPruner):
    """Block ratios from zeroth-order gradients, then layer-wise pruning (arXiv 2310.02998).

    Parameters
    ----------
    score_by
        `zeroth`: how far the loss moves, the paper's; also times |W|, `zeroth_magnitude`, or squared, `zeroth_square`.
        `gradient`, `magnitude`, `square`: the same of true gradients.
    fine
        `wanda` or `sparsegpt`.
    group
        What shares one ratio: a `block`, or a `layer`, here a weight matrix.
    mean
        A group's importance is a mean over its weights rather than a sum over its matrices.
    slack
        No group's sparsity exceeds the whole's by more (0.1); `most` sets the largest sparsity instead.
    samples, batch, draws
        Calibration samples for the coarse step, in such batches, and directions drawn for each; every draw counts as
        samples, as released.
    epsilon
        Step along a direction.
    pooled
        Beginnings of names of matrices in which Wanda compares all weights instead of those of a row, as the released
        code does in BLIP's image encoder.
    damping, width
        Of SparseGPT.
    """

    score_by: Score = "zeroth"
    fine: Literal["wanda", "sparsegpt"] = "wanda"
    group: Literal["block", "layer"] = "block"
    mean: bool = False
    slack: Share = 0.1
    most: PositiveShare | None = None
    samples: PositiveInt = 128
    batch: PositiveInt = 8
    draws: PositiveInt = 1
    epsilon: PositiveFloat = 1e-3
    pooled: tuple[str, ...] = ()
    damping: NonNegativeFloat = 0.01
    width: PositiveInt = 128

    name: ClassVar[str] = "ecoflap"
    exempt = {"budget": "blocks keep different shares of one total"}

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        norm: Mapping[str, Callable[[Target], Accumulator]] = {"input_norm": InputNorm}
        return norm if self.fine == "wanda" else {**norm, "inverse_factor": inverse_factors(self.damping)}

    # -- coarse ------------------------------------------------------------------------------------------------------

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        if self.score_by.startswith("zeroth"):
            return {target.name: {"importance": self.moved(target, probe)} for target in probe.targets}
        square = self.score_by == "square"
        result = probe.gradients({"gradient": lambda target: MeanGradient(square)}, batch=self.batch)
        return {
            t.name: {"importance": importance(self.score_by, probe.weights(t)["weight"], gradient=g["gradient"]).sum()}
            for t, g in ((t, result[t.name]) for t in probe.targets)
        }

    def moved(self, target: Target, probe: Probe) -> Tensor:
        """Zeroth-order importance of one matrix, which afterwards is to the bit what it was."""
        rng, slopes = probe.signals(target).rng, []
        with probe.trial([(target, Decision(torch.ones(target.shape, dtype=torch.bool)))]):
            weight = probe.weights(target)["weight"]
            for batch in self.batches(probe.samples):
                seed = int(torch.randint(SEEDS, (), generator=rng))
                slopes.append(
                    slope(weight, lambda: torch.stack([probe.loss(s) for s in batch]).mean(), seed, self.epsilon)  # noqa: B023
                )
            return importance(self.score_by, weight, slopes).sum()

    def batches(self, samples: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """The batch of every draw, until as many samples were seen."""
        seen = 0
        for start in range(0, len(samples), self.batch):
            if seen >= self.samples:
                return
            for _ in range(self.draws):
                yield (part := samples[start : start + self.batch])
                seen += len(part)

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        if budget.unit != "ratio" or (len(budget.amounts) > 1 and not budget.names):
            raise PrunelabError(f"ecoflap shares one ratio out over the blocks, such as 0.5; it got {budget}")
        keep = sum(t.units * budget.at(t.component if budget.names else t.block).amounts[0] for t in targets)
        groups: dict[Any, list[int]] = {}
        for i, target in enumerate(targets):
            groups.setdefault(target.block if self.group == "block" else target.name, []).append(i)
        sizes = torch.tensor([sum(targets[i].units for i in group) for group in groups.values()])
        each = [seen["importance"].float().cpu() for seen in signals]
        scores = torch.stack([torch.stack([each[i] for i in group]).sum() for group in groups.values()])
        whole = int(sizes.sum())
        most = self.most if self.most is not None else min(1.0, round(1 - keep / whole + self.slack, 6))
        sparsities = shared_out(scores / sizes if self.mean else scores, sizes, int(round(keep, 3)), most)
        results = [budget] * len(targets)
        for sparsity, group in zip(sparsities.tolist(), groups.values(), strict=True):
            for i in group:
                results[i] = self.amount(sparsity, targets[i])
        return results

    def amount(self, sparsity: float, target: Target) -> Budget:
        """The budget of a matrix: for Wanda so many of each row, rounded down as released."""
        whole = self.fine == "sparsegpt" or target.name.startswith(self.pooled)
        return Budget(1 - sparsity) if whole else Budget(gone(target.shape[-1], sparsity), "removed")

    # -- fine --------------------------------------------------------------------------------------------------------

    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        return signals.weight.abs().float() * signals["input_norm"].sqrt()

    def mask(self, target: Target, scores: Tensor, budget: Budget) -> Tensor:
        return (
            masks.per_matrix(scores, budget) if target.name.startswith(self.pooled) else masks.per_row(scores, budget)
        )

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        if self.fine == "wanda":
            return super().solve(target, signals, budget)
        weight = signals.weight.float().masked_fill(signals["input_norm"] == 0, 0)
        masks.refuse_nan(weight, target.name)
        kept, updated = prune_matrix(weight, signals["inverse_factor"], budget, self.width)
        return Decision(kept, {"weight": updated})


def gone(columns: int, sparsity: float) -> int:
    """Weights of a row that leave."""
    return math.floor(columns * sparsity)
