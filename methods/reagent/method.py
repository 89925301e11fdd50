"""ReAGent (Zhao and Shan, 2024, arXiv 2402.00794): attribution for generative language models by replacing tokens.

Random parts of a context are replaced by other tokens, again and again. When the target becomes less likely, the
replaced tokens gain importance and the others lose it. A run ends when the most important tokens alone, all others
replaced, still bring the target among the likeliest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt, Share
from prunelab.common.ranking.attribution import Attribution, likeliest

Logits = Callable[[Tensor], Tensor]  # of the next token [B, V], for contexts [B, T]
Replace = Callable[[Tensor], Tensor]  # tokens [B, T] in the place of tokens [B, T]


@dataclass(frozen=True)
class Trace:
    """What R runs did in S steps: where they replaced [S, R, T], importance after every step [S, R, T], and whether the
    stopping condition held [S, R]."""

    masks: Tensor
    importance: Tensor
    stop: Tensor

    @property
    def stopped(self) -> Tensor:
        """Runs [R] that reached the stopping condition."""
        return self.stop.any(0)

    @property
    def final(self) -> Tensor:
        """Importance [R, T] of each run where it stopped, or after its last step."""
        return self.importance[-1]

    def mean(self) -> Tensor:
        """Importance [T], the mean over the runs that stopped; NaN where none did (released)."""
        return self.final[self.stopped].mean(0)

    def top(self, n: int) -> Tensor:
        """The n most important positions [R, n] of every run."""
        return self.final.argsort(-1, descending=True)[:, :n]

    def rationale(self, n: int, overlap: int = 2) -> Tensor:
        """Positions, ascending, that are among the n most important of at least `overlap` runs."""
        counts = torch.bincount(self.top(n).flatten(), minlength=self.final.shape[1])
        return (counts >= overlap).nonzero().squeeze(1)


def update(change: Tensor, masks: Tensor) -> Tensor:
    """What logit scores gain [..., T] from the fall of the target's probability [...] by replacing masks [..., T]."""
    signed = torch.where(masks, change[..., None], -change[..., None])
    return (0.5 * signed + 0.5).logit(eps=torch.finfo(signed.dtype).eps)


def rationalised(
    tokens: Tensor,
    target: int,
    logits: Logits,
    replace: Replace,
    initial: Tensor,
    uniforms: Callable[[int], Tensor],
    *,
    ratio: float = 0.1,
    top_n: int = 3,
    top_k: int = 3,
    max_steps: int = 3000,
    together: int = 8,
    at_once: int = 64,
) -> Trace:
    """Runs side by side until all of them have stopped.

    Steps depend on each other through sums alone, so that `together` of them are read in one pass of the model, and
    more when a run takes long; at most `at_once` contexts are in a pass. Runs that have stopped are read no more.

    Parameters
    ----------
    initial
        Logit scores [R, T] to start from.
    uniforms
        Draws [C, R, T] of the next C steps; a token is replaced where its draw is below `ratio`.
    """
    runs, length = initial.shape

    def read(contexts: Tensor) -> Tensor:
        flat = contexts.reshape(-1, length)
        return torch.cat([logits(part) for part in flat.split(at_once)]).view(*contexts.shape[:-1], -1)

    def swapped(masks: Tensor) -> Tensor:
        context = tokens.expand(masks.shape)
        return torch.where(masks, replace(context.reshape(-1, length)).view(masks.shape), context)

    def fall(masks: Tensor) -> Tensor:
        contexts, other = swapped(masks), masks.any(-1)  # what is as it was need not be read
        change = before.new_zeros(other.shape)
        if bool(other.any()):
            change[other] = before - read(contexts[other]).softmax(-1)[..., target]
        return change

    before = logits(tokens[None])[0].softmax(-1)[target]
    scores, results, taken = initial, [], 0
    stopped = torch.zeros(runs, dtype=torch.bool, device=initial.device)
    while taken < max_steps and not bool(stopped.all()):
        steps = min(max(together, taken // 4), max_steps - taken)
        masks, going = uniforms(steps) < ratio, ~stopped
        change = fall(masks[:, going])
        each = scores[going] + update(change, masks[:, going]).cumsum(0)
        best = each.topk(min(top_n, length), -1).indices
        rest = torch.ones_like(masks[:, going]).scatter(-1, best, False)
        likely = read(swapped(rest)).topk(top_k, -1).indices
        importance = initial.new_zeros(masks.shape)
        importance[:, going] = each.softmax(-1)
        stop = torch.zeros(masks.shape[:2], dtype=torch.bool, device=initial.device)
        stop[:, going] = (likely == target).any(-1)
        results.append((masks, importance, stop))
        scores = scores.clone()
        scores[going] = each[-1]
        stopped, taken = stopped | stop.any(0), taken + steps
    masks, importance, stop = (torch.cat(parts) for parts in zip(*results, strict=True))
    first = torch.where(stop.any(0), stop.int().argmax(0), len(stop) - 1)  # a run that has stopped stays as it is
    steps = int(first.max()) + 1
    seen = torch.arange(steps, device=first.device)[:, None].minimum(first), torch.arange(runs, device=first.device)
    return Trace(masks[:steps], importance[seen], stop[seen])


@dataclass(frozen=True)
class ReAGent(Attribution):
    """ReAGent (arXiv 2402.00794). Services: `next_token_logits` of the model that is explained, for contexts [B, T],
    and `replace`, which draws tokens in the place of others, given them and a generator.

    Parameters
    ----------
    runs
        Independent runs, whose importance is averaged.
    ratio
        Share of the tokens that a step replaces.
    top_n, top_k
        A run stops when its top_n tokens alone bring the target among the model's top_k.
    max_steps
        Steps of a run at most.
    together, at_once
        Steps that are read in one pass to begin with, and contexts in a pass at most; neither changes the outcome.
    seed
        Of the draws.
    """

    runs: PositiveInt = 3
    ratio: Share = 0.1
    top_n: PositiveInt = 3
    top_k: PositiveInt = 3
    max_steps: NonNegativeInt = 3000
    together: PositiveInt = 8
    at_once: PositiveInt = 64
    seed: NonNegativeInt = 0

    name: ClassVar[str] = "reagent"
    services: ClassVar[tuple[str, ...]] = ("next_token_logits", "replace")

    def trace(self, tokens: Tensor, services: Mapping[str, Any], target: int | None = None) -> Trace:
        """The runs on a context [T]."""
        if not 0 < self.ratio <= 1 or min(self.runs, self.top_n, self.top_k, self.max_steps, self.together) < 1:
            raise PrunelabError("reagent needs a ratio above 0 and at most 1, and at least one run, step, n and k")
        logits, shape = services["next_token_logits"], (self.runs, len(tokens))
        rng, others = torch.Generator().manual_seed(self.seed), torch.Generator().manual_seed(self.seed + 1)

        def draws(*size: int) -> Tensor:
            return torch.rand(size, generator=rng).to(tokens.device)

        return rationalised(
            tokens, likeliest(tokens, logits, target), logits, lambda units: services["replace"](units, others),
            draws(*shape), lambda steps: draws(steps, *shape), ratio=self.ratio, top_n=self.top_n, top_k=self.top_k,
            max_steps=self.max_steps, together=self.together, at_once=self.at_once,
        )  # fmt: skip

    def importance(self, tokens: Tensor, services: Mapping[str, Any], target: int | None = None) -> Tensor:
        trace = self.trace(tokens, services, target)
        # Where no run stopped, the released mean is that of nothing; all of them are averaged instead.
        return trace.mean() if bool(trace.stopped.any()) else trace.final.mean(0)
