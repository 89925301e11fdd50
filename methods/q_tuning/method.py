"""Q-Tuning (Wang et al., 2025, arXiv 2509.23873): samples and tokens of every batch pruned together. A reconstruction.

Samples lie in the plane of perplexity and entropy. Of its corners those high in both (noise) and low in both (known
already) go; confident errors (high perplexity, low entropy) stay without their worst tokens, and unsure but right ones
(low perplexity, high entropy) stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping
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
Quadrants = tuple[Literal["Q1", "Q2", "Q3", "Q4"], ...]
ALL_QUADRANTS: Quadrants = ("Q1", "Q2", "Q3", "Q4")


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


def within(quadrants: tuple[Tensor, ...], names: Quadrants) -> Tensor:
    """Mask [n] of the samples in the quadrants named."""
    mask = torch.zeros_like(quadrants[0])
    for number, quadrant in enumerate(quadrants, 1):
        mask = mask | quadrant if f"Q{number}" in names else mask
    return mask


def bisection(
    perplexity: Tensor,
    entropy: Tensor,
    share: float,
    upper: float = 0.49,
    rounds: int = 10,
    kept: Quadrants = ("Q2", "Q4"),
) -> Tensor:
    """The fraction at which the kept quadrants hold about `share` of the samples: too few, and both axes relax
    (algorithm 1). Their intervals move together, so that one fraction stands for both."""
    low, high = perplexity.new_zeros((), dtype=torch.float64), perplexity.new_full((), upper, dtype=torch.float64)
    middle = (low + high) / 2
    for _ in range(rounds):
        middle = (low + high) / 2
        few = within(corners(perplexity, entropy, middle), kept).double().mean() < share
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
    tokens : {"perplexity", "excess"}
        What tokens are ranked by: their perplexity, or, as in Rho-1, by how much their loss exceeds that of a model
        `reference`; of the latter the largest stay.
    dropped, thinned
        Quadrants whose samples go, and those that lose tokens: the ablations of tables 4 and 15.
    upper, rounds
        Where the interval of the bisection ends, 0.49 in the pseudo-code and 0.5 in the text, and how often it is
        halved.
    """

    neighbours: NonNegativeFloat = 0.5
    reverse: bool = False
    tokens: Literal["perplexity", "excess"] = "perplexity"
    dropped: Quadrants = ("Q1", "Q3")
    thinned: Quadrants = ("Q2",)
    upper: Share = 0.49
    rounds: NonNegativeInt = 10

    name: ClassVar[str] = "q_tuning"
    when: ClassVar[Literal["before", "each_batch"]] = "each_batch"
    chooses: ClassVar[Parts] = ("samples", "tokens")

    @property
    def services(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("reference",) if self.tokens == "excess" else ()

    def requires(self) -> frozenset[str]:
        return frozenset({"loss", "entropy"} | ({"reference_loss"} if self.tokens == "excess" else set()))

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        samples, tokens = self.budgets(budget)
        answers = examples.counted
        perplexity = answer_mean(examples.loss.double(), answers).exp()
        entropy = answer_mean(examples.entropy.double(), answers)
        share = samples.count(len(examples)) / len(examples)
        left = tuple(name for name in ALL_QUADRANTS if name not in self.dropped)
        fraction = bisection(perplexity, entropy, share, self.upper, self.rounds, left)
        quadrants = corners(perplexity, entropy, fraction)
        # assumption: where more than the budget lie in Q2 and Q4, supp decides among them, too; where all four corners
        # hold too few, samples of the middle come last.
        rank = 2.0 * within(quadrants, left) + 1.0 * within(quadrants, self.dropped)
        kept = best_samples(rank + 0.5 * support(perplexity, entropy), samples)
        mask = best_tokens(self.worth(examples), answers, tokens)
        # assumption: what fills up from other corners keeps all of its tokens, as Q4 does.
        return DataPlan(kept, torch.where(within(quadrants, self.thinned)[:, None], mask, answers))

    def worth(self, examples: Examples) -> Tensor:
        """What a quadrant's tokens are kept by [n, N]."""
        if self.tokens == "excess":
            return examples.loss - examples.reference_loss
        scores = smoothed(examples.loss.double().exp(), examples.counted, self.neighbours)
        return scores if self.reverse else -scores


def info_batch(loss: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """InfoBatch (arXiv 2303.04947) brought to a batch and a budget: worth [n], by which `count` samples stay, and what
    each counts [n]. Samples whose loss [n] is below the mean go first, in a random order, then the others; those below
    it that stay stand for those that went."""
    low = loss < loss.mean()
    drawn = torch.rand(len(loss), generator=rng).to(loss.device)
    gone = (len(loss) - count) / low.sum().clamp_min(1)  # r, the share that goes of those below the mean
    weight = torch.where(low & (gone < 1), 1 / (1 - gone).clamp_min(1e-12), torch.ones_like(loss))
    return drawn - 1.0 * low, weight


@dataclass(frozen=True)
class SamplesAndTokens(DataSelector):
    """The pairs of baselines of Q-Tuning (arXiv 2509.23873): one rule for the samples of a batch, another for the
    answer tokens of those that stay.

    Parameters
    ----------
    samples : {"random", "shortest", "entropy", "infobatch"}
        At random, all but the longest (the paper's Longest), those of highest entropy, or all but those of low loss.
    tokens : {"random", "perplexity", "fastv", "sparsevlm", "rho1", "token_cleaning"}
        At random; all but those of highest perplexity; all but those to which the last token pays least in the final
        layer; all but those that pay least to the prompt's relevant words; those whose loss exceeds that of a model
        `reference` most, or those whose loss fell most from a model `history` to it.
    """

    samples: Literal["random", "shortest", "entropy", "infobatch"] = "random"
    tokens: Literal["random", "perplexity", "fastv", "sparsevlm", "rho1", "token_cleaning"] = "random"

    name: ClassVar[str] = "samples_and_tokens"
    when: ClassVar[Literal["before", "each_batch"]] = "each_batch"
    chooses: ClassVar[Parts] = ("samples", "tokens")

    @property
    def services(self) -> tuple[str, ...]:  # type: ignore[override]
        return {"rho1": ("reference",), "token_cleaning": ("reference", "history")}.get(self.tokens, ())

    def requires(self) -> frozenset[str]:
        return frozenset((*_SAMPLES[self.samples], *_TOKENS[self.tokens]))

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        samples, tokens = self.budgets(budget)
        answers, device = examples.counted, examples.counted.device
        worth, weight = torch.rand(len(examples), generator=examples.rng).to(device), None
        if self.samples == "entropy":
            worth = answer_mean(examples.entropy, answers)
        elif self.samples == "shortest":
            worth = -examples.lengths.double()
        elif self.samples == "infobatch":
            count = samples.count(len(examples))
            worth, weight = info_batch(answer_mean(examples.loss, answers), count, examples.rng)
        return DataPlan(best_samples(worth, samples), best_tokens(self.worth(examples), answers, tokens), weight)

    def worth(self, examples: Examples) -> Tensor:
        """What the tokens [n, N] are kept by."""
        if self.tokens == "random":
            return torch.rand(examples.counted.shape, generator=examples.rng).to(examples.counted.device)
        first, *second = (getattr(examples, name) for name in _TOKENS[self.tokens])
        scores: Tensor = first - second[0] if second else first
        return -scores if self.tokens == "perplexity" else scores


# Rules and the signals that each reads; of two the difference counts.
_SAMPLES: Mapping[str, tuple[str, ...]] = {
    "random": (),
    "shortest": (),
    "entropy": ("entropy",),
    "infobatch": ("loss",),
}
_TOKENS: Mapping[str, tuple[str, ...]] = {
    "random": (),
    "perplexity": ("loss",),
    "fastv": ("last_attention",),
    "sparsevlm": ("rater_attention",),
    "rho1": ("loss", "reference_loss"),
    "token_cleaning": ("history_loss", "reference_loss"),
}
