"""The role of methods that prune weights, heads, channels, experts or layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method
from prunelab.common.weights import masks
from prunelab.common.weights.rounds import Rounds
from prunelab.common.weights.targets import Accumulator, Decision, Probe, Statistics, Target, Unit, WeightSignals


class WeightPruner(Method):
    """Prunes weights, heads, channels, experts or layers: calibrate, score, allocate, mask, update.

    A `sequential` method decides block by block on a stream the earlier, pruned blocks gave: `solve` is its heart.
    Any other scores every target on the dense model's stream first and then decides on all together: `select`.
    """

    role: ClassVar[str] = "weight_pruner"
    needs_base: ClassVar[bool] = False  # prunes what fine-tuning changed, and reads the model before it
    quantises: ClassVar[bool] = False  # takes budgets in bits, and no others
    corpora: ClassVar[tuple[str, ...]] = ()  # parts of the calibration set that it reads by name
    forgets: ClassVar[bool] = False  # statistics serve the scores alone, and are let go once these are made
    traces: ClassVar[bool] = False  # follows what flows back through a classifier, and reads labelled samples

    @property
    def sequential(self) -> bool:
        """Whether blocks are decided one after the other."""
        return True

    @property
    def in_turn(self) -> bool:
        """Whether the weights of a block that read different inputs are decided one after the other, each measured on
        the block as those before have left it."""
        return False

    @property
    def units(self) -> Sequence[Unit]:
        """What the method prunes."""
        return ("linear",)

    @property
    def rounds(self) -> Rounds:
        """In how many rounds the budget is reached; `prune(..., rounds=...)` says otherwise."""
        return Rounds()

    @property
    def calibrated(self) -> bool:
        """Whether the method reads a calibration set: by default where it measures anything."""
        precomputes = type(self).precompute is not WeightPruner.precompute
        return precomputes or any(self.statistics(unit) for unit in self.units)

    def build(self, info: Any) -> nn.Module | None:
        """The method's learned part for these targets (`info`), untrained, or None: what `precompute` trains and finds
        in `Probe.learned`. It is stored with the plan, and serves other models with targets of the same shapes."""
        return None

    def prepared(self, samples: list[Any]) -> list[Any]:
        """The sequences that stream through the blocks, made of those that the calibration set holds."""
        return samples

    def covers(self, target: Target) -> bool:
        """Whether the method touches a target of its units."""
        return True

    def measures(self, component: str) -> bool:
        """Whether a calibration set passes through this component of a model of several, if any does: by default
        through each."""
        return True

    def statistics(self, unit: Unit) -> Mapping[str, Callable[[Target], Accumulator]]:
        """What is accumulated over the calibration set at each target of a unit, by name."""
        return {}

    def rotations(self, widths: Mapping[str, int], rng: torch.Generator) -> Mapping[str, Tensor]:
        """Orthogonal matrices by which spaces of the model are rotated before anything is measured, by name; `widths`
        are those that the model allows. What the model computes stays the same."""
        return {}

    def precompute(self, probe: Probe) -> Mapping[str, Statistics]:
        """Further statistics, by target and name, measured once on the whole dense model (gradients, losses)."""
        return {}

    @abstractmethod
    def score(self, target: Target, signals: WeightSignals) -> Tensor:
        """Importance of every unit, of the target's shape, larger is better."""

    def allocate(self, targets: Sequence[Target], signals: Sequence[WeightSignals], budget: Budget) -> Sequence[Budget]:
        """The budget of every target; by default the same for all, or one amount a block. The signals of a sequential
        method hold what `precompute` found, the others' everything."""
        return [budget.at(target.component if budget.names else target.block) for target in targets]

    def mask(self, target: Target, scores: Tensor, budget: Budget) -> Tensor:
        """Mask of what stays, of the target's shape: by default the best of each row, or the best structures."""
        return masks.per_row(scores, budget)

    def update(self, target: Target, signals: WeightSignals, mask: Tensor) -> Mapping[str, Tensor]:
        """New values by role, for methods that make up for what was taken away."""
        return {}

    def stand_ins(self, target: Target, mask: Tensor) -> Tensor | None:
        """`Decision.share` of a target of experts that is decided with all others; None where tokens are sent among
        those that stay."""
        return None

    def solve(self, target: Target, signals: WeightSignals, budget: Budget) -> Decision:
        """A sequential method's decision on one target. Methods that choose and update at once override this."""
        scores = signals.without_gone(self.score(target, signals))
        masks.refuse_nan(scores, target.name)
        mask = self.mask(target, scores, budget)
        return Decision(mask, self.update(target, signals, mask))

    def select(
        self, targets: Sequence[Target], signals: Sequence[WeightSignals], scores: Sequence[Tensor], budget: Budget
    ) -> Sequence[Tensor]:
        """The masks of all targets at once. Methods that compare scores across targets override this; layers
        and sublayers are compared by default."""
        if all(target.whole for target in targets):
            return list(masks.per_row(torch.cat(list(scores)), budget).split(1))
        budgets = self.allocate(targets, signals, budget)
        return [self.mask(t, s, b) for t, s, b in zip(targets, scores, budgets, strict=True)]
