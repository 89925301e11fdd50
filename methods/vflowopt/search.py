"""How a strategy is found: Bayesian optimisation of what a pruned model's last token keeps of the unpruned one's.

The objective is modelled by scikit-learn's Gaussian process; after a start at random each trial is where the expected
improvement is largest (Algorithm 1 of the paper).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from torch import nn

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.vflowopt.method import VFlowOpt


@dataclass(frozen=True)
class Strategy:
    """R1 and R2, the options of `VFlowOpt`, and R3, which the target leaves."""

    first: float
    second: float
    threshold: float
    cell: float
    entropy: float
    third: float

    def method(self) -> VFlowOpt:
        """The method with these options."""
        return VFlowOpt(self.threshold, self.entropy, self.cell)

    def budget(self) -> Budget:
        """The shares of the three stages."""
        return Budget((self.first, self.second, self.third))

    def retention(self, depth: int = 28) -> float:
        """The share of the visual tokens that a layer sees, in the mean over the decoder's."""
        lengths, left, total = stages(depth), 1.0, 0.0
        for share, length in zip((self.first, self.second, self.third), lengths, strict=True):
            left *= share
            total += left * length
        return total / depth


@dataclass(frozen=True)
class Space:
    """Ranges that are searched: the released ones, which depend on the target T. R1 runs from T to 1.5 T, R2 from a
    fifth over R1's upper end to 1."""

    target: float = 0.25
    threshold: tuple[float, float] = (0.0, 50.0)
    cell: tuple[float, float] = (3.0, 24.0)
    entropy: tuple[float, float] = (-1.0, 1.0)
    least: float = 0.2
    depth: int = 28

    def bounds(self) -> np.ndarray:
        """[5, 2] of R1, R2, threshold, cell and entropy."""
        most = min(1.0, 1.5 * self.target)
        second = min(1.0, self.least / most)
        return np.array([(self.target, most), (second, 1.0), self.threshold, self.cell, self.entropy])

    def strategy(self, point: Sequence[float]) -> Strategy:
        """A point of the space, its third stage solved from the target."""
        first, second, threshold, cell, entropy = map(float, point)
        one, two, three = stages(self.depth)
        seen = self.depth * self.target - first * one - first * second * two
        third = min(1.0, max(0.0, seen / three / (first * second)))
        return Strategy(first, second, threshold, cell, entropy, third)


def stages(depth: int) -> tuple[int, int, int]:
    """Layers of each stage: 9, 9 and 10 of 28."""
    return depth // 3, depth // 3, depth - 2 * (depth // 3)


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """By how much a normal value of this mean and deviation is above `best`, on average."""
    gain = mean - best
    ratio = gain / np.maximum(deviation, 1e-12)
    return gain * norm.cdf(ratio) + deviation * norm.pdf(ratio)


def optimise(
    objective: Callable[[Strategy], float],
    space: Space | None = None,
    trials: int = 50,
    start: int = 10,
    candidates: int = 2000,
    seed: int = 42,
) -> list[tuple[Strategy, float]]:
    """Strategies tried with what the objective said of each, the best first. The paper makes 50 trials, the released
    code 300, of which 27 at random.

    Raises PrunelabError where a trial gives no finite number.
    """
    space = Space() if space is None else space
    if not 1 <= start <= trials:
        raise PrunelabError(f"{trials} trials cannot begin with {start} at random; begin with 1 to {trials}")
    random, bounds = np.random.default_rng(seed), space.bounds()
    kernel = ConstantKernel(1.0) * Matern(np.ones(len(bounds)), (0.05, 20.0), nu=2.5) + WhiteKernel(1e-4, (1e-8, 1.0))
    points: list[np.ndarray] = []
    results: list[tuple[Strategy, float]] = []
    for trial in range(trials):
        draws = random.random((candidates if trial >= start else 1, len(bounds)))
        if trial >= start:
            values = np.array([value for _, value in results])
            model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=seed)
            with warnings.catch_warnings():  # a length scale at its end means that a parameter does not matter
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(np.stack(points), values)
            mean, deviation = model.predict(draws, return_std=True)
            draws = draws[[int(expected_improvement(mean, deviation, float(values.max())).argmax())]]
        points.append(draws[0])
        strategy = space.strategy(bounds[:, 0] + draws[0] * (bounds[:, 1] - bounds[:, 0]))
        value = float(objective(strategy))
        if not math.isfinite(value):
            raise PrunelabError(f"vflowopt: the strategy {strategy} gives no finite number; check model and prompts")
        results.append((strategy, value))
    return sorted(results, key=lambda one: one[1], reverse=True)


@torch.inference_mode()
def similarity(model: nn.Module, prompts: Sequence[Mapping[str, Any]]) -> Callable[[Strategy], float]:
    """The paper's objective: the cosine of the last token's last hidden state with and without pruning, summed over
    prompts (the model's arguments, one sample each; 30 in the paper)."""

    def states() -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack(
                [model(**p, output_hidden_states=True).hidden_states[-1][0, -1].float() for p in prompts]
            )

    whole = states()

    def values(strategy: Strategy) -> float:
        with apply(strategy.method(), model, strategy.budget()):
            return float(torch.cosine_similarity(states(), whole, dim=-1).sum())

    return values
