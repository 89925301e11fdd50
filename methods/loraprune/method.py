"""LoRAPrune (Zhang et al., Findings of ACL 2024): heads and channels leave while LoRA trains, by what LoRA tells.

The gradient of a frozen weight is estimated from the factors B, A of its update and their gradients,
g = gB A + B gA - gB gA, and the importance of a weight is |g (W + scale B A)|. Sums over a head's or a channel's
weights, each module's over its norm, are averaged over steps, and the least go, ever more of them along a cubic.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, PositiveInt, Share
from prunelab.common.training.method import Training, TrainingMethod, low_rank, masked
from prunelab.common.training.parametrizations import Attachment
from prunelab.common.training.schedule import Cubic, Schedule
from prunelab.common.weights import masks
from prunelab.common.weights.targets import Decision, Target, Unit

Metric = Literal["lora", "magnitude", "grad"]


def estimated_gradient(up: Tensor, down: Tensor, up_gradient: Tensor, down_gradient: Tensor) -> Tensor:
    """g = gB A + B gA - gB gA [out, in], of factors B [out, r] and A [r, in] (equation 8, at a step size of one)."""
    return up_gradient @ down + up @ down_gradient - up_gradient @ down_gradient


def importance(weight: Tensor, gradient: Tensor | None, squared: bool = False) -> Tensor:
    """|g w| [out, in], or the magnitude alone; the paper squares it."""
    result = (weight if gradient is None else weight * gradient).abs()
    return result.square() if squared else result


def by_unit(scores: Tensor, units: int, inputs: bool, norm: bool = True) -> Tensor:
    """Sums [units] of a module's scores [out, in] over the equal parts of its outputs or inputs, over their norm."""
    result = scores.sum(0 if inputs else 1).view(units, -1).sum(1)
    return result / (result.norm() + 1e-8) if norm else result


def averaged(before: Tensor, now: Tensor, keep: float = 0.9) -> Tensor:
    """The moving average [units], left alone where the new value is no number."""
    return torch.where(now.isnan(), before, keep * before + (1 - keep) * now)


@dataclass(frozen=True)
class LoRAPrune(TrainingMethod):
    """Structured pruning of heads and channels while low-rank factors train (arXiv 2305.18403).

    Works on a plain model, to which it gives factors, and on one of `peft`, whose factors it takes.

    Parameters
    ----------
    rank, scale
        Of the factors, and of what they add (alpha over rank).
    metric
        Importance of a weight: from the factors' gradients (`lora`), `magnitude` alone, or the weight's own gradient
        (`grad`), for which weights need gradients as well.
    squared
        As the paper writes it; the release takes absolute values.
    average
        What stays of the moving average at each step.
    every
        Steps from one pruning to the next.
    warmup, cooldown
        Shares of the training before pruning begins and after it ends.
    spared
        Share of the first layers that lose nothing, as does the last layer.
    """

    rank: PositiveInt = 8
    scale: NonNegativeFloat = 2.0
    metric: Metric = "lora"
    squared: bool = False
    average: Share = 0.9
    every: PositiveInt = 10
    warmup: Share = 0.1
    cooldown: Share = 0.1
    spared: Share = 0.1

    name: ClassVar[str] = "loraprune"

    @property
    def units(self) -> Sequence[Unit]:
        return ("heads", "channels")

    def targets(self, adapter: Any) -> list[Target]:
        depth = len(adapter.blocks)
        results = [t for t in super().targets(adapter) if int(self.spared * depth) <= t.block < depth - 1]
        if not results:
            raise PrunelabError(f"loraprune spares all {depth} layers; use a deeper model, or spare fewer")
        return results

    def schedule(self, steps: int) -> Schedule:
        return Cubic.of(steps, warmup=self.warmup, cooldown=self.cooldown, whole=False)

    def linears(self, target: Target, training: Training) -> list[Target]:
        """The linears of a structure; the last one reads its units."""
        results = [t for t in training.linears if t.name.startswith(f"{target.name}.") and t.block == target.block]
        *writers, reader = results or [target]
        fused = len(results) != 4 if target.unit == "heads" else not 2 <= len(results) <= 3
        if fused or any(t.shape[0] % target.units for t in writers) or reader.shape[1] % target.units:
            raise PrunelabError(
                f"loraprune: the projections of {target.name} are fused; their factors tell no units apart"
            )
        return results

    def attach(self, training: Training) -> Sequence[Attachment]:
        factors = [
            low_rank(training, linear, self.rank, self.scale)
            for target in training.targets
            for linear in self.linears(target, training)
        ]
        return [*factors, *(masked(target) for target in training.targets)]

    def trainable(self, names: Sequence[str], training: Training) -> Collection[str]:
        linears = [linear for target in training.targets for linear in self.linears(target, training)]
        own = {name for linear in linears for name in training.learned(linear)}
        if self.metric == "grad":
            weights = {id(training.original(linear)) for linear in linears}
            own |= {name for name, p in training.model.named_parameters() if id(p) in weights}
        return [name for name in names if name in own]

    def options(self, name: str) -> Mapping[str, float]:
        """Weights of which only the gradient is wanted do not move."""
        return {"scale": 0.0, "weight_decay": 0.0} if name.endswith("weight.original") else {}

    def after_backward(self, training: Training) -> None:
        for target in training.targets:
            *_, reader = linears = self.linears(target, training)
            parts = [by_unit(self.importance(linear, training), target.units, linear is reader) for linear in linears]
            now = torch.stack(parts).sum(0)
            before = training.memory.get(target.name, torch.zeros_like(now))
            training.memory[target.name] = averaged(before, now, self.average)

    def importance(self, linear: Target, training: Training) -> Tensor:
        """The importance [out, in] of a linear's weights."""
        factors = training.low_rank(linear)
        weight = training.parameter(linear).float() + self.scaled(factors).float()
        if self.metric == "magnitude":
            return importance(weight, None, self.squared)
        if self.metric == "grad":
            return importance(weight, training.gradient(linear).float(), self.squared)
        assert factors.up.grad is not None and factors.down.grad is not None
        four = (factors.up.detach(), factors.down.detach(), factors.up.grad, factors.down.grad)
        return importance(weight, estimated_gradient(*(part.float() for part in four)), self.squared)

    def scaled(self, factors: object) -> Tensor:
        """What factors add to a weight."""
        delta: Tensor = factors.delta().detach()  # type: ignore[attr-defined]
        return delta

    def after_step(self, training: Training) -> None:
        if training.step % self.every == 0:
            self.prune(training, training.budget)

    def prune(self, training: Training, budget: Budget) -> None:
        """Mask the least important units of every target; those that are masked stay so."""
        for target in training.targets:
            scores = training.memory[target.name].masked_fill(~training.mask(target), -1.0)
            training.prune(target, masks.per_row(scores, budget.at(target.block)))

    def finish(self, training: Training) -> Mapping[str, Decision]:
        self.prune(training, training.target_budget)
        return super().finish(training)
