"""Q-Tuning (Wang et al., 2025, arXiv 2509.23873): samples and tokens of every batch pruned together. A reconstruction.

Samples lie in the plane of perplexity and entropy. Of its corners those high in both (noise) and low in both (known
already) go; confident errors (high perplexity, low entropy) stay without their worst tokens, and unsure but right ones
(low perplexity, high entropy) stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, Share
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector, best_samples, best_tokens

Parts = tuple[Literal["samples", "tokens"], ...]


def answer_mean(values: Tensor, answers: Tensor) -> Tensor:
    """Means [n] of values [n, N] over the answer tokens."""
    return (values * answers).sum(1) / answers.sum(1).clamp_min(1)


def quantile(values: Tensor, fraction: Tensor) -> Tensor:
    """The smallest of values [n] with at least that fraction of them at or below it; no interpolation."""
    count = (fraction.double() * len(values) - 1e-9).ceil().clamp(1, len(values)).long()
    return values.sort().values[count - 1]


def corners(perplexity: Tensor, entropy: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks [n] of Q1 (high perplexity, high entropy), Q2 (high, low), Q3 (low, low) and Q4 (low, high), beyond the
    quantiles `fraction` and 1 - `fraction` of each axis (section 3.2)."""
    high, low = perplexity >= quantile(perplexity, 1 - fraction), perplexity <= quantile(perplexity, fraction)
    unsure, sure = entropy >= quantile(entropy, 1 - fraction), entropy <= quantile(entropy, fraction)
    return high & unsure, high & sure, low & sure, low & unsure


def bisection(perplexity: Tensor, entropy: Tensor, share: float, upper: float = 0.49, rounds: int = 10) -> Tensor:
    """The fraction at which Q2 and Q4 hold about `share` of the samples: too few, and both axes relax (algorithm 1).
    Their intervals move together, so that one fraction stands for both."""
    low, high = perplexity.new_zeros((), dtype=torch.float64), perplexity.new_full((), upper, dtype=torch.float64)
    middle = (low + high) / 2
    for _ in range(rounds):
        middle = (low + high) / 2
        _, misconceived, _, calibrating = corners(perplexity, entropy, middle)
        few = (misconceived | calibrating).double().mean() < share
        low, high = torch.where(few, middle, low), torch.where(few, high, middle)
    return middle


def support(perplexity: Tensor, entropy: Tensor) -> Tensor:
    """supp(x) [n]: how far apart a sample's perplexity and entropy are, each brought to [0, 1] over the batch."""
    scaled = [(v - v.min()) / (v.max() - v.min()).clamp_min(1e-12) for v in (perplexity, entropy)]
    return (scaled[0] - scaled[1]).abs()


def smoothed(perplexity: Tensor, answers: Tensor, weight: float = 0.5) -> Tensor:
    """s [n, N]: a token's perplexity and, with that weight, the sum of its neighbours' within the answer."""
    # assumption: a neighbour that is missing at either end adds nothing.
    own = perplexity * answers
    return (1 - weight) * own + weight * (F.pad(own[:, :-1], (1, 0)) + F.pad(own[:, 1:], (0, 1)))


@dataclass(frozen=True)
class QTuning(DataSelector):
    """Q-Tuning (arXiv 2509.23873). A budget has two amounts, the samples and the answer tokens that stay:
    `"0.125,0.5"`.

    Parameters
    ----------
    neighbours
        Weight of the neighbours' perplexity, lambda.
    reverse
        Whether the tokens of lowest perplexity go, not those of highest: the ablation "Reversed PPL".
    upper, rounds
        Where the interval of the bisection ends, 0.49 in the pseudo-code and 0.5 in the text, and how often it is
        halved.
    """

    neighbours: NonNegativeFloat = 0.5
    reverse: bool = False
    upper: Share = 0.49
    rounds: NonNegativeInt = 10

    name: ClassVar[str] = "q_tuning"
    when: ClassVar[Literal["before", "each_batch"]] = "each_batch"
    chooses: ClassVar[Parts] = ("samples", "tokens")

    def requires(self) -> frozenset[str]:
        return frozenset({"loss", "entropy"})

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        samples, tokens = self.budgets(budget)
        answers = examples.counted
        perplexity = answer_mean(examples.loss.double(), answers).exp()
        entropy = answer_mean(examples.entropy.double(), answers)
        share = samples.count(len(examples)) / len(examples)
        fraction = bisection(perplexity, entropy, share, self.upper, self.rounds)
        noisy, misconceived, known, calibrating = corners(perplexity, entropy, fraction)
        # assumption: where more than the budget lie in Q2 and Q4, supp decides among them, too; where all four corners
        # hold too few, samples of the middle come last.
        rank = 2.0 * (misconceived | calibrating) + 1.0 * (noisy | known)
        kept = best_samples(rank + 0.5 * support(perplexity, entropy), samples)
        scores = smoothed(examples.loss.double().exp(), answers, self.neighbours)
        mask = best_tokens(scores if self.reverse else -scores, answers, tokens)
        # assumption: what fills up from other corners keeps all of its tokens, as Q4 does.
        return DataPlan(kept, torch.where(misconceived[:, None], mask, answers))


@dataclass(frozen=True)
class SamplesAndTokens(DataSelector):
    """The pairs of baselines of Q-Tuning (arXiv 2509.23873): one rule for the samples of a batch, another for the
    answer tokens of those that stay.

    Parameters
    ----------
    samples : {"random", "shortest", "entropy"}
        At random, all but the longest (the paper's Longest), or those of highest entropy.
    tokens : {"random", "perplexity"}
        At random, or all but those of highest perplexity.
    """

    samples: Literal["random", "shortest", "entropy"] = "random"
    tokens: Literal["random", "perplexity"] = "random"

    name: ClassVar[str] = "samples_and_tokens"
    when: ClassVar[Literal["before", "each_batch"]] = "each_batch"
    chooses: ClassVar[Parts] = ("samples", "tokens")

    def requires(self) -> frozenset[str]:
        return frozenset(n for n in (_SAMPLES[self.samples], _TOKENS[self.tokens]) if n)

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        samples, tokens = self.budgets(budget)
        answers, device = examples.counted, examples.counted.device
        worth = torch.rand(len(examples), generator=examples.rng).to(device)
        if self.samples == "entropy":
            worth = answer_mean(examples.entropy, answers)
        elif self.samples == "shortest":
            worth = -examples.lengths.double()
        scores = torch.rand(answers.shape, generator=examples.rng).to(device)
        if self.tokens == "perplexity":
            scores = -examples.loss
        return DataPlan(best_samples(worth, samples), best_tokens(scores, answers, tokens))


_SAMPLES = {"random": "", "shortest": "", "entropy": "entropy"}  # rules and the signal that each reads
_TOKENS = {"random": "", "perplexity": "loss"}
