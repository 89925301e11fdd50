"""IST (Yao et al., Findings of EMNLP 2024, arXiv 2410.11772): importance-aware sparse tuning.

At every step the low-rank factors of a few layers alone are trained. Which ones is drawn by scores that are learned on
the way: every now and then the factors of some layers are damped, and layers whose damping leaves the loss low are
trained less often (reinforcement by the loss of a few trials).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from prunelab.common.training.method import Batch, Training, TrainingMethod, low_rank
from prunelab.common.training.parametrizations import Attachment
from prunelab.common.weights.targets import Decision, Target


def draw(weights: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """A mask [n] of `count` layers, drawn without replacement in proportion to weights [n]."""
    chosen = torch.multinomial(weights, count, generator=rng)
    return torch.zeros(len(weights), dtype=torch.bool).index_fill(0, chosen, True)


def draw_apart(weights: Tensor, count: int, trials: int, rng: torch.Generator) -> Tensor:
    """Masks [K, n] of the layers that are damped in each trial, no two of them alike while there are others."""
    results: list[Tensor] = []
    while len(results) < trials:
        mask = draw(weights, count, rng)
        left = len(results) < comb(len(weights), count)
        if not (left and any(torch.equal(mask, other) for other in results)):
            results.append(mask)
    return torch.stack(results)


def updated(scores: Tensor, damped: Tensor, losses: Tensor, rate: float = 10.0) -> Tensor:
    """Scores [n] after trials with layers damped [K, n] and their losses [K]: a trial's reward is exp(-loss) above the
    mean, and every damped layer moves by rate * reward * p (1 - p), with p the sigmoid of the scores as they were."""
    rewards = (-losses).exp()
    rewards = rewards - rewards.mean()
    p = scores.sigmoid()
    return scores + rate * p * (1 - p) * (rewards[:, None] * damped).sum(0)


@dataclass(frozen=True)
class IST(TrainingMethod):
    """IST (arXiv 2410.11772) on low-rank factors, its own or those that peft gave the model. A budget is the share of
    the layers that are trained at a step: 0.25 in the paper; 1.0 is plain LoRA.

    Parameters
    ----------
    rank, alpha
        Of the factors, where peft brought none.
    roles
        Linears of a block that have factors, by the end of their names; none for all of them.
    interval
        Steps between updates of the scores; the first is not at the start.
    trials, suppressed, damping
        Trials of an update, the share of the layers that each damps, and the factor that these are damped by.
    rate
        Of the update.
    """

    rank: PositiveInt = 32
    alpha: PositiveFloat = 64.0
    roles: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    interval: PositiveInt = 10
    trials: NonNegativeInt = 3
    suppressed: Share = 0.5
    damping: NonNegativeFloat = 0.25
    rate: NonNegativeFloat = 10.0

    name: ClassVar[str] = "ist"

    def covers(self, target: Target) -> bool:
        return target.block >= 0 and (not self.roles or target.role.rpartition(".")[2] in self.roles)

    def attach(self, training: Training) -> Sequence[Attachment]:
        if min(self.interval, self.trials) < 1 or not 0 < self.suppressed <= 1:
            raise PrunelabError(
                "ist needs an interval and trials of at least 1, and a share of layers to damp in (0, 1]"
            )
        room = min(min(target.shape) for target in training.targets)
        return [low_rank(training, target, min(self.rank, room), self.alpha / self.rank) for target in training.targets]

    def start(self, training: Training) -> None:
        training.memory["scores"] = torch.zeros(len(self.layers(training)))

    def layers(self, training: Training) -> list[int]:
        """The blocks that have factors."""
        return sorted({target.block for target in training.targets})

    def before_step(self, batch: Callable[[], Batch], training: Training) -> None:
        if training.step == 0 or training.step % self.interval:
            return
        scores = training.memory["scores"].cpu()
        count = max(1, int(self.suppressed * len(scores)))
        damped = draw_apart(scores.sigmoid(), count, self.trials, training.rng)
        trial = batch()
        losses = torch.stack([self.tried(mask, trial, training) for mask in damped]).float().cpu()
        training.memory["scores"] = updated(scores, damped, losses, self.rate)

    def tried(self, mask: Tensor, batch: Batch, training: Training) -> Tensor:
        """The loss of a batch with the factors of some layers damped."""
        chosen = {block for block, kept in zip(self.layers(training), mask.tolist(), strict=True) if kept}
        factors = [training.low_rank(target) for target in training.targets if target.block in chosen]
        for factor in factors:
            factor.gain = self.damping
        try:
            return training.loss(batch)
        finally:
            for factor in factors:
                factor.gain = 1.0

    def trainable(self, names: Sequence[str], training: Training) -> Collection[str]:
        scores = training.memory["scores"].cpu()
        mask = draw((-scores).sigmoid(), max(1, training.target_budget.count(len(scores))), training.rng)
        chosen = {block for block, kept in zip(self.layers(training), mask.tolist(), strict=True) if kept}
        return [name for target in training.targets if target.block in chosen for name in training.learned(target)]

    def finish(self, training: Training) -> Mapping[str, Decision]:
        return {target.name: Decision(torch.ones(target.shape, dtype=torch.bool)) for target in training.targets}
