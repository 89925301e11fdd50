"""Sparse pre-training (Jin et al., ICLR 2025): prune while a language model is trained, and count its parameters on
average over the training.

Between two steps of the training the smallest weights of all layers leave, by the same factor each time, and never come
back. What the loss comes to in the end follows the law of dense models, with the average number of parameters for N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import PositiveInt, Share
from prunelab.common.training.method import Batch, Training, TrainingMethod
from prunelab.common.training.schedule import Exponential, Schedule
from prunelab.common.weights.targets import Target, Unit

GROUP, PROTECTED = 4, 2  # of the 2:4 pattern
HEADS = ("lm_head.weight", "embed_out.weight")


def events(begin: int, end: int, every: int) -> list[int]:
    """Steps at which weights leave."""
    return list(range(begin, end + 1, every))


def keep_fractions(keep: float, count: int) -> list[float]:
    """Shares of the dense model that stay after each of `count` events: keep^(k / count), the same cut each time."""
    return [keep ** (k / count) for k in range(1, count + 1)]


def pruned(scores: Sequence[Tensor], keep: float, pattern: bool = False) -> tuple[list[Tensor], float]:
    """Masks of what stays of scores of any shapes, which are 0 for what has left, and the threshold that all share.

    The n - int(keep n) smallest of all go, but what equals the threshold stays. Under the 2:4 `pattern` only the two
    smallest of every four neighbours may go, and those at the threshold go too.
    """
    joined = torch.cat([s.flatten() for s in scores])
    place = len(joined) - int(keep * len(joined))
    if not pattern:
        threshold = joined.sort().values[min(place, len(joined) - 1)]
        return [s >= threshold for s in scores], float(threshold)
    if any(s.numel() % GROUP for s in scores):
        raise PrunelabError("sparse_pretraining: weights do not divide into groups of four; leave the pattern out")
    groups = [s.flatten().view(-1, GROUP) for s in scores]
    smallest = [g.sort(1).values[:, : GROUP - PROTECTED] for g in groups]
    candidates = torch.cat([s.flatten() for s in smallest]).sort().values
    if place < 1:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores], float("-inf")
    threshold = candidates[min(place - 1, len(candidates) - 1)]  # as released, no more than half can go
    kept = [g > torch.minimum(threshold, s[:, -1:]) for g, s in zip(groups, smallest, strict=True)]
    return [mask.view_as(s) for mask, s in zip(kept, scores, strict=True)], float(threshold)


def average_parameters(parameters: Sequence[float]) -> float:
    """N_avg, the mean over training steps of equally many tokens (Eq. 2)."""
    return float(np.mean(parameters))


def law(n: np.ndarray, d: np.ndarray, e: float, a: float, b: float, alpha: float, beta: float) -> np.ndarray:
    """Loss of a model of n parameters on average after d tokens: E + A / n^alpha + B / d^beta (Eq. 1)."""
    result: np.ndarray = e + a / n**alpha + b / d**beta
    return result


def fitted(n: np.ndarray, d: np.ndarray, loss: np.ndarray, delta: float = 1e-3) -> dict[str, float]:
    """The law's coefficients for runs of n parameters, d tokens and their losses: the least Huber loss of logarithms,
    by L-BFGS from a grid of starts (Hoffmann et al., arXiv 2203.15556). Where all runs read equally many tokens, the
    term of tokens is part of E."""
    from scipy.optimize import minimize

    many = len(np.unique(d)) > 1

    def objective(x: np.ndarray) -> float:
        terms = [np.full_like(n, x[0], dtype=float), x[1] - x[2] * np.log(n)]
        if many:
            terms.append(x[3] - x[4] * np.log(d))
        error = np.abs(np.logaddexp.reduce(terms) - np.log(loss))
        return float(np.where(error <= delta, error**2 / 2, delta * (error - delta / 2)).sum())

    grid = [(e, a, alpha) for e in (-1.0, 0.0, 1.0) for a in (0.0, 5.0, 10.0) for alpha in (0.2, 0.5, 1.0)]
    starts = [(*start, *(start[1:] if many else ())) for start in grid]
    best = min((minimize(objective, start, method="L-BFGS-B") for start in starts), key=lambda results: results.fun).x
    results = {"e": float(np.exp(best[0])), "a": float(np.exp(best[1])), "alpha": float(best[2])}
    return results | ({"b": float(np.exp(best[3])), "beta": float(best[4])} if many else {"b": 0.0, "beta": 1.0})


@dataclass(frozen=True)
class SparsePretraining(TrainingMethod):
    """Gradual global magnitude pruning while a model is pre-trained (arXiv 2501.12486). The budget is the share of all
    prunable weights that stays in the end.

    Parameters
    ----------
    begin, end
        Shares of the training's steps between which weights leave: a quarter and three quarters, which the authors
        find best as shares of compute. Sparse steps cost less, so that their 70M model prunes from 15 to 62 % of steps.
    every
        Steps from one cut to the next.
    criterion
        `magnitude`, or `random`.
    pattern
        Leave two of every four neighbours alone, so that the result fits the 2:4 pattern.
    layout
        Neighbours lie along a layer's outputs, as in the authors' kernels (`kernel`), or along its inputs (`weight`),
        as hardware wants them.
    head
        The output layer is pruned, too, where it has a weight of its own, as released.
    skip
        Weights whose names hold one of these words stay whole.
    """

    begin: Share = 0.25
    end: Share = 0.75
    every: PositiveInt = 100
    criterion: Literal["magnitude", "random"] = "magnitude"
    pattern: bool = False
    layout: Literal["kernel", "weight"] = "kernel"
    head: bool = True
    skip: tuple[str, ...] = ()

    name: ClassVar[str] = "sparse_pretraining"
    exempt = {"budget": "weights of all layers are compared"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end < self.begin:
            raise PrunelabError(f"sparse_pretraining ends at {self.end:g} of the training, before {self.begin:g}")

    @property
    def units(self) -> Sequence[Unit]:
        return ("linear", "tensor") if self.head else ("linear",)

    def covers(self, target: Target) -> bool:
        wanted = target.unit == "linear" or target.name.endswith(HEADS)
        return wanted and not any(word in target.name for word in self.skip)

    def steps(self, steps: int) -> list[int]:
        """The events of a training of so many steps."""
        return events(int(self.begin * steps), int(self.end * steps), self.every)

    def schedule(self, steps: int) -> Schedule:
        at = self.steps(steps)
        return Exponential(begin=at[0] - self.every, end=at[-1], every=self.every)

    def before_step(self, batch: Callable[[], Batch], training: Training) -> None:
        if training.step not in self.steps(training.steps):
            return
        if training.budget.unit != "ratio" or len(training.budget.amounts) != 1:
            raise PrunelabError(
                f"sparse_pretraining keeps one share of all weights, such as 0.2, not {training.budget}"
            )
        self.cut(training)

    def cut(self, training: Training) -> None:
        """Let weights leave until as many stay as the schedule says."""
        scores = []
        for target in training.targets:
            weight = training.parameter(target).abs()
            if self.criterion == "random":
                weight = torch.rand(weight.shape, generator=training.rng).to(weight.device)
            scores.append(self.turned(weight * training.mask(target)))
        result, _ = pruned(scores, training.budget.amounts[0], self.pattern)
        for target, mask in zip(training.targets, result, strict=True):
            training.prune(target, self.turned(mask) & training.mask(target))

    def turned(self, tensor: Tensor) -> Tensor:
        """A weight [out, in] as the authors' kernel [in, out], and back."""
        return tensor.T if self.layout == "kernel" and tensor.dim() == 2 else tensor
