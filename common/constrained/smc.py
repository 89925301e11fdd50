"""Sequential Monte Carlo over texts: weighted particles that a constrained sampler extends token by token.

Weights that are proper at every token are proper for whole texts, and their mean estimates the mass that the language
model gives to the texts of the constraint (Del Moral et al. 2006; Lew et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from prunelab.common.constrained.constraints import Constraint
from prunelab.common.constrained.role import ConstrainedSampler
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError


class NextTokens(Protocol):
    """A language model behind a prompt."""

    def start(self, particles: int) -> Tensor:
        """Logits [P, V] behind the prompt, the same in every row; forgets what was fed before."""

    def feed(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Logits [P, V] when row i goes on as row parents[i] [P] did, with tokens[i] [P]."""


@dataclass(frozen=True)
class Particles:
    """What came of P particles.

    tokens: of each, without the end token. log_weights: [P] float64, -inf where a particle met a dead end. complete:
    [P] whether the text satisfies the constraint as a whole; False where it was cut off. calls: of the constraint in
    all. draws: tokens that were drawn in all, the end among them.
    """

    tokens: tuple[tuple[int, ...], ...]
    log_weights: Tensor
    complete: tuple[bool, ...]
    calls: int
    draws: int

    @property
    def log_z(self) -> float:
        """Estimate of the log mass of the constraint's texts under the model; -inf where all particles died."""
        whole = self.log_weights.masked_fill(~torch.tensor(self.complete), -math.inf)
        return float(whole.logsumexp(0)) - math.log(len(self.tokens))

    @property
    def posterior(self) -> Tensor:
        """Normalised weights [P], all 0 where every particle died."""
        alive = self.log_weights > -math.inf
        return self.log_weights.softmax(0).nan_to_num(0.0) if bool(alive.any()) else torch.zeros(len(self.tokens))


@dataclass
class _Particle:
    state: Any
    tokens: tuple[int, ...] = ()
    log_weight: float = 0.0
    done: bool = False


def run(
    sampler: ConstrainedSampler,
    model: NextTokens,
    constraint: Constraint,
    budget: Budget,
    particles: int = 5,
    threshold: float = 0.5,
    max_tokens: int = 100,
    rng: torch.Generator | None = None,
) -> Particles:
    """Extend, weigh, and resample where the effective sample size falls below `threshold` of the particles.

    budget: constraint calls a token. Ends when every particle has ended, met a dead end, or has max_tokens tokens.
    """
    if particles < 1 or max_tokens < 1 or not 0 <= threshold <= 1:
        raise PrunelabError("SMC needs at least one particle and one token, and a threshold between 0 and 1")
    calls = draws = 0

    def counting(state: Any) -> Callable[[int], bool]:
        def allows(token: int) -> bool:
            nonlocal calls
            calls += 1
            return constraint.allows(state, token)

        return allows

    cloud = [_Particle(constraint.start()) for _ in range(particles)]
    logits = model.start(particles)
    for _ in range(max_tokens):
        for particle, row in zip(cloud, logits, strict=True):
            particle.done |= constraint.closed(particle.state)
            if particle.done:
                continue
            token, log_weight = sampler.sample(row, counting(particle.state), budget, rng)
            draws += 1
            particle.log_weight += log_weight
            particle.done = token == constraint.end or log_weight == -math.inf
            if not particle.done:
                particle.tokens = (*particle.tokens, token)
                particle.state = constraint.step(particle.state, token)
                particle.done = constraint.closed(particle.state)
        if all(p.done for p in cloud):
            break
        parents, weights = resample(torch.tensor([p.log_weight for p in cloud], dtype=torch.float64), threshold, rng)
        followed = zip(parents.tolist(), weights.tolist(), strict=True)
        cloud = [replace(cloud[i], log_weight=weight) for i, weight in followed]
        last = [p.tokens[-1] if p.tokens else 0 for p in cloud]  # rows that are done are fed, and read no more
        logits = model.feed(parents, torch.tensor(last))
    alive = [p.log_weight > -math.inf for p in cloud]
    return Particles(
        tuple(p.tokens for p in cloud),
        torch.tensor([p.log_weight for p in cloud], dtype=torch.float64),
        tuple(a and p.done for a, p in zip(alive, cloud, strict=True)),
        calls,
        draws,
    )


def resample(log_weights: Tensor, threshold: float, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Whom each particle follows [P], and the weights [P] from there: drawn in proportion to the weights, which become
    their mean, where the effective sample size (sum w)^2 / sum w^2 is below `threshold` times P; else all as it was."""
    count = len(log_weights)
    total = log_weights.logsumexp(0)
    if total == -math.inf or float((2 * total - (2 * log_weights).logsumexp(0)).exp()) >= threshold * count:
        return torch.arange(count), log_weights
    # assumption: multinomial, as in the library that the authors' code runs on; the paper does not say
    parents = torch.multinomial((log_weights - total).exp(), count, replacement=True, generator=rng)
    return parents, (total - math.log(count)).expand(count)
