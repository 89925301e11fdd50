"""PST (Li et al., IJCAI 2022): fine-tune frozen weights into sparse ones with few parameters of one's own.

A weight W is used as M * W' with W' = W + beta U V. The mask M keeps the weights of largest score
S = |W'| + alpha1 A B + alpha2 (R + C): how large they are, a low-rank matrix, and a number a row and a column. W stays
as it was; the small factors learn, and the gradient of the mask is that of the scores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, PositiveInt, Share
from prunelab.common.training.method import Training, TrainingMethod
from prunelab.common.training.parametrizations import Attachment, straight_through
from prunelab.common.training.schedule import Cubic, Schedule
from prunelab.common.weights.targets import Decision, Target


class SparseWeight(nn.Module):
    """The masked weight of a linear [out, in], with its low-rank update and scores. gone: weights that are zero."""

    def __init__(
        self, shape: tuple[int, ...], rank: int, rank_of_scores: int, beta: float, alpha1: float, alpha2: float
    ) -> None:
        super().__init__()
        rows, columns = shape
        if max(rank, rank_of_scores) > min(shape):
            raise PrunelabError(
                f"factors of rank {max(rank, rank_of_scores)} do not fit a weight of {rows} x {columns}"
            )
        self.u, self.v = nn.Parameter(torch.randn(rows, rank)), nn.Parameter(torch.zeros(rank, columns))
        self.a = nn.Parameter(torch.randn(rows, rank_of_scores))
        self.b = nn.Parameter(torch.zeros(rank_of_scores, columns))
        self.r, self.c = nn.Parameter(torch.zeros(rows)), nn.Parameter(torch.zeros(columns))
        self.beta, self.alpha1, self.alpha2, self.gone = beta, alpha1, alpha2, 0

    def updated(self, weight: Tensor) -> Tensor:
        """W' = W + beta U V."""
        return weight + self.beta * (self.u @ self.v)

    def scores(self, updated: Tensor) -> Tensor:
        """S of W'."""
        apart = self.r.unsqueeze(1) + self.c
        return updated.abs() + self.alpha1 * (self.a @ self.b) + self.alpha2 * apart

    def mask(self, scores: Tensor) -> Tensor:
        """True but for the `gone` smallest scores of the whole matrix."""
        kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
        kept[scores.detach().flatten().topk(self.gone, largest=False).indices] = False
        return kept.view_as(scores)

    def forward(self, weight: Tensor) -> Tensor:
        updated = self.updated(weight)
        scores = self.scores(updated)
        return (straight_through(self.mask(scores), scores) * updated).to(weight.dtype)


@dataclass(frozen=True)
class PST(TrainingMethod):
    """Parameter-efficient sparse fine-tuning (arXiv 2205.11005).

    Parameters
    ----------
    rank, rank_of_scores
        Of the update U V and of the scores' A B.
    beta, alpha1, alpha2
        Weights of the update, of A B, and of row and column numbers.
    warmup, cooldown
        Shares of the training before pruning begins and after it ends; in between it rises along a cubic.
    trains
        Names within those of parameters that are trained along: heads of classifiers.
    """

    rank: PositiveInt = 8
    rank_of_scores: PositiveInt = 8
    beta: FiniteFloat = 1.0
    alpha1: FiniteFloat = 1.0
    alpha2: FiniteFloat = 1.0
    warmup: Share = 0.1
    cooldown: Share = 0.3
    trains: tuple[str, ...] = ("classifier", "qa_outputs", "score.")

    name: ClassVar[str] = "pst"
    exempt = {"budget": "of each matrix as a whole, not of each of its rows"}

    def schedule(self, steps: int) -> Schedule:
        return Cubic.of(steps, warmup=self.warmup, cooldown=self.cooldown, whole=False)

    def attach(self, training: Training) -> Sequence[Attachment]:
        ranks = (self.rank, self.rank_of_scores)
        return [
            Attachment(target, SparseWeight(target.shape, *ranks, self.beta, self.alpha1, self.alpha2))
            for target in training.targets
        ]

    def trainable(self, names: Sequence[str], training: Training) -> Collection[str]:
        own = {name for target in training.targets for name in training.learned(target)}
        return [name for name in names if name in own or any(part in name for part in self.trains)]

    def before_step(self, batch: object, training: Training) -> None:
        self.prune(training, training.budget)

    def prune(self, training: Training, budget: Budget) -> None:
        """Let as many weights of every matrix be zero as a budget says."""
        for target in training.targets:
            self.weight(target, training).gone = budget.pruned(target.units)

    def weight(self, target: Target, training: Training) -> SparseWeight:
        """What lies on a target."""
        return next(module for module in training.modules(target) if isinstance(module, SparseWeight))

    def finish(self, training: Training) -> Mapping[str, Decision]:
        self.prune(training, training.target_budget)
        results = {}
        for target in training.targets:
            module = self.weight(target, training)
            with torch.no_grad():
                results[target.name] = Decision(module.mask(module.scores(module.updated(training.parameter(target)))))
        return results
