"""ClaPS (Zhou, Wan et al., Findings of EMNLP 2023, arXiv 2310.12774): prompt search in a clustered, pruned vocabulary.

The vocabulary is clustered by its embeddings, and one token of a cluster stays. Of these the ones stay that alone
change a few-shot reward most. A plain search then puts prompts together from what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveInt
from prunelab.common.ranking.role import Ranker, Ranking

Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["cross_entropy", "gap", "entropy"]
Score = Literal["reward", "kl"]
Reward = Callable[[Array], Array]  # of prompts [P, K], which are places of the vocabulary: [P]

MARKS = ("\u2581", "\u0120")  # what begins a word in SentencePiece and in byte-level vocabularies


# -- the vocabulary --------------------------------------------------------------------------------------------------


def word_starts(vocabulary: Sequence[str], special: Sequence[str] = ()) -> list[int]:
    """Places of the tokens that begin a word, special tokens left out."""
    return [i for i, token in enumerate(vocabulary) if any(m in token for m in MARKS) and token not in special]


def representatives(embeddings: Tensor, clusters: int = 2000, seed: int = 0) -> list[int]:
    """The tokens, ascending, that are nearest to the centres of k-means over embeddings [V, D]; a token near several
    centres counts once, so that they may be fewer than clusters."""
    points = embeddings.double().cpu().numpy()
    if not 1 <= clusters <= len(points):
        raise PrunelabError(f"{len(points)} tokens cannot be put into {clusters} clusters; choose fewer")
    centres = KMeans(n_clusters=clusters, random_state=seed, n_init=1).fit(points).cluster_centers_
    distances = torch.cdist(torch.from_numpy(centres), torch.from_numpy(points))
    return sorted({int(i) for i in distances.argmin(1)})


# -- rewards ---------------------------------------------------------------------------------------------------------


def reward(
    logits: Tensor, target: Tensor, kind: Kind = "cross_entropy", correct: float = 200.0, incorrect: float = 180.0
) -> Tensor:
    """Rewards [...] of prompts from the logits of the classes [..., N, C] on N examples with answers [N].

    `cross_entropy` takes the probabilities for logits, so that the softmax is applied twice (released). `gap`: the
    probability of the answer over that of the best other class, times `correct` where it is above 0, else `incorrect`;
    classes exactly as probable as the answer do not count as others.
    """
    probabilities = logits.softmax(-1)
    answers = target.expand(logits.shape[:-1])
    if kind == "cross_entropy":
        losses = F.cross_entropy(probabilities.flatten(0, -2), answers.flatten(), reduction="none")
        return -losses.view(answers.shape).mean(-1)
    if kind == "entropy":
        return -entropy(logits)
    own = probabilities.gather(-1, answers.unsqueeze(-1))
    gap = own.squeeze(-1) - torch.where(probabilities == own, -1.0, probabilities).amax(-1)
    return (gap * torch.where(gap > 0, correct, incorrect)).mean(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the classes, summed over the examples [..., N, C]: [...]."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum((-1, -2))


def divergence(logits: Tensor, empty: Tensor) -> Tensor:
    """KL of the classes with a prompt [..., N, C] to those without [N, C], summed over examples."""
    logs = logits.log_softmax(-1)
    return (logs.exp() * (logs - empty.log_softmax(-1))).sum((-1, -2))


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of right answers [...]."""
    return (logits.argmax(-1) == target).float().mean(-1)


def above_percentile(scores: Tensor, percentile: float) -> list[int]:
    """Places of scores [K] strictly above their percentile, between ranks linear; ties at it go."""
    values = scores.double().numpy()
    return [int(i) for i in np.flatnonzero(values > np.percentile(values, percentile))]


@dataclass(frozen=True)
class ClaPS(Ranker[Sequence[str]]):
    """ClaPS (arXiv 2310.12774): a vocabulary by what each token alone does to a few-shot reward. A budget is the share
    that stays: the 90th percentile is `Budget(0.1)`, the 99th 0.01.

    Services: `class_logits` gives the logits of the classes [K, N, C] on the N few-shot examples for prompts, `targets`
    are their answers [N].

    Parameters
    ----------
    score : {"reward", "kl"}
        The reward over that of the empty prompt, or how far the classes move from it.
    kind : {"cross_entropy", "gap", "entropy"}
        See `reward`.
    correct, incorrect
        Coefficients of the gap.
    batch
        Prompts asked together.
    """

    score: Score = "reward"
    kind: Kind = "cross_entropy"
    correct: NonNegativeFloat = 200.0
    incorrect: NonNegativeFloat = 180.0
    batch: PositiveInt = 256

    name: ClassVar[str] = "claps"
    services: ClassVar[tuple[str, ...]] = ("class_logits", "targets")
    exempt = {"budget": "tokens at the percentile go, and with equal scores that is more than the share asked"}

    def rank(self, units: Sequence[str], services: Mapping[str, Any] | None = None) -> Tensor:
        """Scores [n] of tokens."""
        assert services is not None
        if not len(units):
            raise PrunelabError("there is no token to choose from; give at least one")
        ask, target = services["class_logits"], torch.as_tensor(services["targets"])
        empty = ask([""])[0]
        parts = [ask(list(units[i : i + self.batch])) for i in range(0, len(units), self.batch)]
        logits = torch.cat(parts)
        if self.score == "kl":
            return divergence(logits, empty)
        return self.rewards(logits, target) - self.rewards(empty, target)

    def rewards(self, logits: Tensor, target: Tensor) -> Tensor:
        """Rewards of prompts from the logits of the classes [..., N, C]."""
        return reward(logits, target, self.kind, self.correct, self.incorrect)

    def take(self, units: Sequence[str], ranking: Ranking, budget: Budget) -> list[int]:
        """All tokens above the percentile."""
        share = float(budget.amounts[0]) if budget.unit == "ratio" else budget.count(len(units)) / len(units)
        return list(range(len(units))) if share >= 1 else above_percentile(ranking.scores, round(100 * (1 - share), 6))


# -- searches in what is left ----------------------------------------------------------------------------------------


def greedy(reward: Reward, vocabulary: int, length: int = 5) -> Array:
    """A prompt [K] that grows by the token that rewards most; the first of equal ones."""
    prompt = np.empty(0, int)
    for _ in range(length):
        longer = np.column_stack([np.tile(prompt, (vocabulary, 1)), np.arange(vocabulary)])
        prompt = longer[int(np.argmax(reward(longer)))]
    return prompt


def genetic(
    reward: Reward, vocabulary: int, length: int = 5, *, population: int = 128, mutations: int = 64,
    crossovers: int = 64, epochs: int = 30, kept: float = 0.1, rate: float = 0.1, seed: int = 0,
) -> Array:  # fmt: skip
    """The best prompt [K] of a population of which the best share stays, each epoch; a mutation changes each token with
    probability `rate`, and a crossover is one parent whole (released)."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(vocabulary, size=(population, length))
    best, value = pool[0], -np.inf
    for _ in range(epochs):
        rewards = reward(pool)
        order = np.argsort(-rewards, kind="stable")[: max(1, int(len(pool) * kept))]
        if rewards[order[0]] > value:
            best, value = pool[order[0]], rewards[order[0]]
        elite = pool[order]
        changed = elite[rng.integers(len(elite), size=mutations)].copy()
        hits = rng.random(changed.shape) < rate
        shift = rng.integers(1, max(vocabulary, 2), size=changed.shape)
        changed = np.where(hits, (changed + shift) % vocabulary, changed)
        pool = np.concatenate([elite, changed, elite[rng.integers(len(elite), size=crossovers)]])
    return best


def particle_swarm(
    reward: Reward, vocabulary: int, length: int = 5, *, population: int = 128, epochs: int = 30, mutated: float = 0.1,
    inertia: tuple[float, float] = (0.8, 0.2), pull: tuple[float, float] = (0.8, 0.2), speed: float = 3.0,
    seed: int = 0,
) -> Array:  # fmt: skip
    """The best prompt [K] of a swarm. Where a particle differs from its own best or from the best of all it gains
    speed, else it loses some; with the sigmoid of its speed a token is taken over from its own best (`pull`, first to
    last epoch) and from the best of all (the other way round). A share of the particles then has one token replaced."""
    rng = np.random.default_rng(seed)
    swarm = rng.integers(vocabulary, size=(population, length))
    own, values = swarm.copy(), reward(swarm)
    best, value = swarm[int(np.argmax(values))].copy(), float(values.max())
    velocity = np.repeat(rng.uniform(-speed, speed, (population, 1)), length, 1)
    for epoch in range(epochs):
        done = epoch / epochs
        weight = (inertia[0] - inertia[1]) * (1 - done) + inertia[1]
        to_own, to_best = pull[0] - done * (pull[0] - pull[1]), pull[1] + done * (pull[0] - pull[1])
        apart = np.where(swarm == own, -speed, speed) + np.where(swarm == best, -speed, speed)
        velocity = weight * velocity + (1 - weight) * apart
        chance = 1 / (1 + np.exp(-velocity))
        for goal, share in ((own, to_own), (best, to_best)):
            moves = (rng.random((population, 1)) < share) & (rng.random(swarm.shape) < chance)
            swarm = np.where(moves, goal, swarm)
        rows = np.flatnonzero(rng.random(population) < mutated)
        swarm[rows, rng.integers(length, size=len(rows))] = rng.integers(vocabulary, size=len(rows))
        rewards = reward(swarm)
        better = rewards > values
        own[better], values = swarm[better], np.where(better, rewards, values)
        if rewards.max() > value:
            best, value = swarm[int(np.argmax(rewards))].copy(), float(rewards.max())
    return best
