"""Schedules: a number, or a budget, for each step of a training. They are values, and import no torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError


class Schedule(ABC):
    """A number for each step, counted from 0."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The number of a step."""

    @property
    @abstractmethod
    def last(self) -> int:
        """The step from which on the number stays what it is."""

    @abstractmethod
    def budget(self, step: int, budget: Budget) -> Budget:
        """What is due of `budget` at a step, on the way from the unpruned model to it."""

    def fits(self, steps: int) -> None:
        """Refuse a schedule that a training of so many steps does not bring to its end."""
        if self.last > steps:
            raise PrunelabError(
                f"the schedule ends at step {self.last} of a training of {steps}; train longer or end it earlier"
            )


@dataclass(frozen=True)
class Constant(Schedule):
    """The same at every step: the budget as a whole, for masks that are drawn before the training."""

    value: float = 1.0

    def __call__(self, step: int) -> float:
        return self.value

    @property
    def last(self) -> int:
        return 0

    def budget(self, step: int, budget: Budget) -> Budget:
        return budget


@dataclass(frozen=True)
class Ramp(Schedule):
    """From one number to another between two steps.

    Parameters
    ----------
    initial, final
        The number up to the step `begin`, and from the step `end` on.
    begin, end
        Steps, or places between them. With `end` at `begin` the number jumps.
    every
        In between it changes at `begin` + k * `every` alone.
    """

    initial: float = 1.0
    final: float = 0.0
    begin: float = 0
    end: float = 0
    every: int = 1

    def __post_init__(self) -> None:
        if self.end < self.begin:
            raise PrunelabError(f"the schedule ends at step {self.end}, before it begins at step {self.begin}")
        if self.every < 1:
            raise PrunelabError(f"a schedule cannot change every {self.every} steps; give 1 or more")
        if not (math.isfinite(self.initial) and math.isfinite(self.final)):
            raise PrunelabError(f"a schedule from {self.initial} to {self.final} is not finite; give numbers")

    @classmethod
    def of(
        cls, steps: int, initial: float = 1.0, final: float = 0.0, warmup: float = 0.0, cooldown: float = 0.0,
        every: int = 1, whole: bool = True,
    ) -> Self:  # fmt: skip
        """With the shares `warmup` before and `cooldown` behind it of a training of so many steps, of `whole` steps or
        to the fraction."""
        if not (0 <= warmup <= 1 and 0 <= cooldown <= 1):
            raise PrunelabError(f"warm-up {warmup:g} and cool-down {cooldown:g} are shares of a training, from 0 to 1")
        ahead, behind = warmup * steps, cooldown * steps
        if whole:
            ahead, behind = int(ahead), int(behind)
        return cls(initial, final, ahead, steps - behind, every)

    @property
    def last(self) -> int:
        return math.ceil(self.end)

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return self.final
        if step <= self.begin:
            return self.initial
        passed = step - self.begin
        return self.between((passed // self.every * self.every if self.every > 1 else passed) / (self.end - self.begin))

    @abstractmethod
    def between(self, progress: float) -> float:
        """The number at a share of the way, above 0 and below 1."""

    def budget(self, step: int, budget: Budget) -> Budget:
        if budget.unit != "ratio":
            raise PrunelabError(f"the budget {budget} cannot be approached in steps; give a ratio, such as 0.5")
        amounts = tuple(replace(self, final=amount)(step) for amount in budget.amounts)
        return replace(budget, amount=amounts if len(amounts) > 1 else amounts[0])


@dataclass(frozen=True)
class Linear(Ramp):
    """In a straight line."""

    def between(self, progress: float) -> float:
        return self.initial + (self.final - self.initial) * progress


@dataclass(frozen=True)
class Cubic(Ramp):
    """Fast at first and slow at the end (Zhu & Gupta, arXiv 1710.01878, eq. 1); kept shares and pruned ones alike."""

    def between(self, progress: float) -> float:
        return self.final + (self.initial - self.final) * (1 - progress) ** 3


@dataclass(frozen=True)
class Exponential(Ramp):
    """By the same factor each time ("The Journey Matters", arXiv 2501.12486)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial <= 0 or self.final < 0:
            raise PrunelabError(f"an exponential schedule from {self.initial:g} to {self.final:g} needs positive ends")

    def between(self, progress: float) -> float:
        if self.final == 0:
            raise PrunelabError("an exponential schedule never comes to 0; keep more, or take another schedule")
        return float(self.initial * (self.final / self.initial) ** progress)


@dataclass(frozen=True)
class Temperature(Schedule):
    """How steep a gate's sigmoid is: 1 / (1 - ln s / ln milestone), from 1 towards infinity (PAT, arXiv 2408.14721).

    Parameters
    ----------
    milestone
        Step at which the gate would be a step function.
    freeze
        Share of the milestone from which on the temperature stays what it is.
    """

    milestone: int
    freeze: float = 0.8

    def __post_init__(self) -> None:
        if self.milestone < 2 or not 0 < self.freeze < 1:
            raise PrunelabError(
                f"a temperature with the milestone {self.milestone}, frozen at {self.freeze:g} of it, ends before it"
                " begins; give a milestone of 2 or more and a share between 0 and 1"
            )

    @property
    def last(self) -> int:
        return int(self.freeze * self.milestone)

    def __call__(self, step: int) -> float:
        step = max(1, min(step, self.last))
        return 1 / (1 - math.log(step) / math.log(self.milestone) + 1e-6)

    def budget(self, step: int, budget: Budget) -> Budget:
        return budget
