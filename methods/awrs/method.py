"""AWRS: adaptive weighted rejection sampling (Lipkin et al., COLM 2025), and the samplers it is compared with.

p is the model's next-token distribution and Z the mass of the tokens that a constraint allows. Tokens are tested in
the order of a draw without replacement, so that one wrong guess is never tested twice; the first that is allowed is a
draw from p restricted to the constraint, and what was rejected on the way gives an unbiased estimate of Z.

The estimators are pure functions on log weights [V] in float64, and draw from numpy's generator as the authors do.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.common.constrained.role import ConstrainedSampler
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import PositiveInt

Array = NDArray[np.float64]
Accept = Callable[[int], bool]

DEAD = -1
_HEAD = 64  # tokens that are put in order at first; few passes test more
_EXHAUSTED = 1 - 1e-5  # rejected mass at which the authors' library gives up
_PEAKED = math.log(2 / 3)  # likeliest token from which the library prefers the geometric estimator


class Outcome(NamedTuple):
    """A token, the log of its weight (-inf: no token was found, and the token means nothing)."""

    token: int
    log_weight: float


# -- drawing without replacement -------------------------------------------------------------------------------------


def gumbel_order(log_p: Array, rng: np.random.Generator) -> Iterator[int]:
    """Tokens in the order of draws without replacement in proportion to exp(log_p) [V]: perturbed by Gumbel noise and
    sorted. log_p need not be normalised; tokens at -inf never come. Only as much is sorted as is asked for."""
    noise = rng.random(log_p.shape)
    with np.errstate(divide="ignore"):  # a noise of exactly 0 puts a token last
        keys = log_p - np.log(-np.log(noise))
    head = min(_HEAD, len(keys))
    first = np.argpartition(-keys, head - 1)[:head]
    for token in first[np.argsort(-keys[first])]:
        if keys[token] == -np.inf:
            return
        yield int(token)
    keys[first] = -np.inf
    for token in np.argsort(-keys)[: len(keys) - head]:
        if keys[token] == -np.inf:
            return
        yield int(token)


def remembered(accept: Accept) -> Accept:
    """The same answers; a token that was allowed once is not asked about again."""
    known: set[int] = set()

    def ask(token: int) -> bool:
        if token not in known and not accept(token):
            return False
        known.add(token)
        return True

    return ask


def log1mexp(x: float) -> float:
    """log(1 - exp(x)) for x <= 0, exact at both ends."""
    if x >= 0:
        return -math.inf
    return math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))


# -- the paper's estimator -------------------------------------------------------------------------------------------


def two_passes(log_weights: Array, accept: Accept, rng: np.random.Generator) -> Outcome:
    """Definition 2 with one additional pass: Z is estimated as (1 - psi) / (n + 1), psi the mass rejected in the first
    pass and n the rejections of both. The second pass keeps the accepted token and what was rejected stays out.

    log_weights [V] may be unnormalised; their logsumexp is part of the weight.
    """
    total = float(np.logaddexp.reduce(log_weights))
    log_p = log_weights - total
    result: int | None = None
    rejections, psi = 0, 0.0
    for _ in range(2):
        for token in gumbel_order(log_p.copy(), rng):
            if accept(token):
                result = token if result is None else result
                break
            rejections += 1
            psi += math.exp(log_p[token]) if result is None else 0.0
            log_p[token] = -np.inf
    if result is None:
        return Outcome(DEAD, -math.inf)
    return Outcome(result, total + math.log1p(-min(psi, 1.0)) - math.log(rejections + 1) if psi < 1 else -math.inf)


def one_pass(log_weights: Array, accept: Accept, rng: np.random.Generator, max_rejects: float = math.inf) -> Outcome:
    """The first token that is allowed, without an estimate of Z: locally constrained decoding by adaptive rejection."""
    token = DEAD
    for rejects, token in enumerate(gumbel_order(log_weights, rng), 1):
        if accept(token):
            return Outcome(token, 0.0)
        if rejects >= max_rejects:
            break
    return Outcome(token, -math.inf)


# -- the later estimators of the authors' library --------------------------------------------------------------------


def recursive(log_p: Array, accept: Accept, rng: np.random.Generator, max_rejects: float = math.inf) -> Outcome:
    """One pass that also tests the token behind the accepted one: Z of what is left is 1 if that is allowed as well,
    and the accepted token's share of it otherwise. Every rejection before multiplies the mass that it left."""
    reachable = int(np.isfinite(log_p).sum())
    order = gumbel_order(log_p, rng)
    log_left, rejected = 0.0, 0.0  # log of the product of what rejections left; their mass
    token = DEAD
    for rejects, token in enumerate(order):
        last = rejects == reachable - 1
        log_share = 0.0 if last else min(log_p[token] - math.log1p(-rejected), 0.0)
        final = last or rejects == max_rejects - 1
        if accept(token):
            return Outcome(token, log_left + (0.0 if final or accept(next(order)) else log_share))
        rejected += math.exp(log_p[token])
        if final or rejected >= _EXHAUSTED:
            break
        log_left += log1mexp(log_share)
    return Outcome(token, -math.inf)


def geometric(
    log_p: Array, accept: Accept, rng: np.random.Generator, max_accepts: int = 2, max_rejects: float = math.inf
) -> Outcome:
    """The estimator of inverse binomial sampling, (a - 1) / (a + r - 1) after a successes and r failures. Draws of
    tokens already rejected are not made but counted: how many come before the next new one is geometric."""
    log_p = log_p.copy()
    result = tested = DEAD
    accepts, rejects, rejected = 0, 0.0, 0.0  # counts, and the mass of the tokens rejected
    while accepts < max_accepts and rejects < max_rejects:
        for token in gumbel_order(log_p.copy(), rng):
            tested = token if tested == DEAD else tested
            if rejected > 0:
                rejects += rng.geometric(1 - rejected) - 1
                if rejects >= max_rejects:
                    break
            if accept(token):
                accepts += 1
                result = token if result == DEAD else result
                break
            rejects += 1
            rejected += math.exp(log_p[token])
            log_p[token] = -np.inf
            if rejects >= max_rejects or rejected >= 1:
                break
        else:
            break  # every token was rejected
        if rejected >= 1:
            return Outcome(tested, -math.inf)
    return inverse_binomial(tested if result == DEAD else result, accepts, min(rejects, max_rejects), max_accepts)


def inverse_binomial(token: int, accepts: int, rejects: float, max_accepts: int) -> Outcome:
    """The token with the share of accepts, unbiased for draws that end with the last accept or the last reject asked
    for (Haldane 1945): of all orders of these draws, the share that begins with an accept."""
    successes = min(max_accepts - 1, accepts)
    return Outcome(token, math.log(successes / (accepts + rejects - 1)) if successes else -math.inf)


# -- the samplers ----------------------------------------------------------------------------------------------------


class TokenSampler(ConstrainedSampler):
    """A sampler on log p [V] in float64, where the constraint is not asked twice about a token that it allowed."""

    @property
    def proper(self) -> bool:
        return True

    def sample(
        self, logits: Tensor, allows: Accept, budget: Budget, rng: torch.Generator | None = None
    ) -> tuple[int, float]:
        if logits.dim() != 1 or not bool((logits < math.inf).all()) or not bool((logits > -math.inf).any()):
            raise PrunelabError("a sampler takes one row of logits [V], not all -inf and without NaN; check the model")
        log_p = logits.detach().double().log_softmax(-1).cpu().numpy()
        calls = budget.count(len(log_p))
        seed = int(torch.randint(2**62, (), generator=rng))
        outcome = self.draw(
            log_p, remembered(allows), math.inf if calls >= len(log_p) else calls, np.random.default_rng(seed)
        )
        return outcome if outcome.log_weight > -math.inf else Outcome(DEAD, -math.inf)

    @abstractmethod
    def draw(self, log_p: Array, accept: Accept, calls: float, rng: np.random.Generator) -> Outcome:
        """A token within a number of calls, infinite where every token may be asked about."""


@dataclass(frozen=True)
class AWRS(TokenSampler):
    """Adaptive weighted rejection sampling (arXiv 2504.05410).

    Only the estimators of the library stay unbiased when they have to stop early, so that `paper` needs a budget of
    all tokens. It asks about few of them.

    Parameters
    ----------
    estimator : {"paper", "adaptive", "recursive", "geometric", "none"}
        Of Z. `paper` is the one published; `recursive` and `geometric` are those of the authors' later library,
        `adaptive` chooses between the two as the library does, and `none` gives every token the weight 1, which is
        locally constrained decoding.
    max_accepts : int
        Successes that the geometric estimator waits for; more of them vary less and ask more.
    """

    estimator: Literal["paper", "adaptive", "recursive", "geometric", "none"] = "paper"
    max_accepts: PositiveInt = 2

    name: ClassVar[str] = "awrs"

    @property
    def proper(self) -> bool:
        return self.estimator != "none"

    def draw(self, log_p: Array, accept: Accept, calls: float, rng: np.random.Generator) -> Outcome:
        if self.max_accepts < 2:
            raise PrunelabError(f"max_accepts={self.max_accepts} leaves nothing to estimate Z from; use at least 2")
        if self.estimator == "none":
            return one_pass(log_p, accept, rng, calls)
        if self.estimator == "paper":
            if calls < math.inf:
                raise PrunelabError(
                    "cut short, the paper's estimator is biased; give a budget of 1.0, or use estimator='adaptive'"
                )
            return two_passes(log_p, accept, rng)
        estimator = self.estimator
        if estimator == "adaptive":
            estimator = "geometric" if self.max_accepts > 2 or log_p.max() >= _PEAKED else "recursive"
        # With r rejections the recursive pass asks at most r times, the geometric ones max_accepts - 1 times more.
        max_rejects = calls if estimator == "recursive" else calls - self.max_accepts + 1
        if max_rejects < 2:
            raise PrunelabError(f"{calls:g} constraint calls a token are too few; give at least {self.max_accepts + 1}")
        if estimator == "recursive":
            return recursive(log_p, accept, rng, max_rejects)
        return geometric(log_p, accept, rng, self.max_accepts, max_rejects)


@dataclass(frozen=True)
class LocallyConstrained(TokenSampler):
    """Locally constrained decoding, the baseline of arXiv 2504.05410: the constraint masks the whole vocabulary, and
    what is left is renormalised.

    Parameters
    ----------
    proper : bool
        Weigh by the mass that the mask leaves, instead of by 1 as is usual.
    """

    proper: bool = False

    name: ClassVar[str] = "locally_constrained"

    def draw(self, log_p: Array, accept: Accept, calls: float, rng: np.random.Generator) -> Outcome:
        if calls < math.inf:
            raise PrunelabError(f"a mask asks about all {len(log_p)} tokens; give locally_constrained a budget of 1.0")
        allowed = np.fromiter(map(accept, range(len(log_p))), dtype=bool, count=len(log_p))
        left = np.where(allowed, log_p, -np.inf)
        log_z = float(np.logaddexp.reduce(left))
        if log_z == -math.inf:
            return Outcome(DEAD, -math.inf)
        return Outcome(int(rng.choice(len(left), p=np.exp(left - log_z))), log_z if self.proper else 0.0)


@dataclass(frozen=True)
class TokenRejection(TokenSampler):
    """Plain rejection, a baseline of arXiv 2504.05410: draws with replacement until two are allowed, which gives the
    geometric estimator of Z without its memory. Ends where the budget does, all tokens of it where that is 1.0."""

    name: ClassVar[str] = "token_rejection"

    def draw(self, log_p: Array, accept: Accept, calls: float, rng: np.random.Generator) -> Outcome:
        max_rejects = max(int(min(calls, len(log_p))) - 1, 1)
        if calls < 2:
            raise PrunelabError(f"{calls:g} constraint calls a token are too few for token_rejection; give at least 2")
        result, accepts, rejects = DEAD, 0, 0
        edges = np.exp(log_p).cumsum()
        for token in np.searchsorted(edges / edges[-1], rng.random(max_rejects + 1), side="right").tolist():
            if accept(token):
                accepts += 1
                result = token if result == DEAD else result
            else:
                rejects += 1
            if accepts == 2 or rejects == max_rejects:
                break
        return inverse_binomial(result, accepts, rejects, 2)
