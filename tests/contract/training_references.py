"""A minimal training method for each mechanism of the role, so that each is exercised before its first paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.training.distillation import distillation
from prunelab.common.training.method import Batch, Training, TrainingMethod, low_rank, masked
from prunelab.common.training.parametrizations import Attachment, FakeQuantised, Gate, NoiseGate, straight_through
from prunelab.common.training.schedule import Constant, Cubic, Exponential, Linear, Schedule, Temperature
from prunelab.common.weights import masks
from prunelab.common.weights.targets import Decision, Target, Unit


@dataclass(frozen=True)
class GradualMagnitude(TrainingMethod):
    """The smallest weights go while the others learn on; what has gone stays away."""

    name: ClassVar[str] = "reference_gradual_magnitude"

    def schedule(self, steps: int) -> Schedule:
        return Cubic.of(steps, warmup=0.1, cooldown=0.2)

    def after_step(self, training: Training) -> None:
        for target in training.targets:
            scores = training.weight(target).abs()
            training.prune(target, masks.per_row(scores, training.budget) & training.mask(target))

    def finish(self, training: Training) -> Mapping[str, Decision]:
        self.after_step(training)
        return super().finish(training)


@dataclass(frozen=True)
class RandomMasks(TrainingMethod):
    """A mask drawn before the first step, which never changes."""

    name: ClassVar[str] = "reference_random_masks"

    def start(self, training: Training) -> None:
        for target in training.targets:
            training.prune(target, masks.per_row(torch.rand(target.shape, generator=training.rng), training.budget))


@dataclass(frozen=True)
class LowRankChannels(TrainingMethod):
    """Channels go by a moving average of what the gradients of low-rank factors say of them; the weights are frozen."""

    rank: int = 2
    name: ClassVar[str] = "reference_low_rank_channels"

    @property
    def units(self) -> Sequence[Unit]:
        return ("channels",)

    def schedule(self, steps: int) -> Schedule:
        return Exponential.of(steps, cooldown=0.2, every=2)

    def readers(self, training: Training) -> list[Target]:
        return [t for t in training.linears if t.role.endswith("down_proj")]

    def attach(self, training: Training) -> Sequence[Attachment]:
        factors = [low_rank(training, target, self.rank) for target in self.readers(training)]
        return [*factors, *(masked(target) for target in training.targets)]

    def trainable(self, names: Sequence[str], training: Training) -> list[str]:
        return [name for target in self.readers(training) for name in training.learned(target)]

    def after_backward(self, training: Training) -> None:
        for target, reader in zip(training.targets, self.readers(training), strict=True):
            factors = training.low_rank(reader)
            assert factors.up.grad is not None
            change = factors.up.grad @ factors.down * training.weight(reader)
            memory = training.memory.get(target.name, change.new_zeros(target.shape))
            training.memory[target.name] = 0.9 * memory + 0.1 * change.abs().sum(0)

    def after_step(self, training: Training) -> None:
        for target in training.targets:
            scores = training.memory[target.name].masked_fill(~training.mask(target), -1.0)
            training.prune(target, masks.per_row(scores, training.budget))

    def finish(self, training: Training) -> Mapping[str, Decision]:
        self.after_step(training)
        return super().finish(training)


class Scored(nn.Module):
    """A mask whose scores learn by the straight-through gradient: the weight's size, and a term a row and a column."""

    mask: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.zeros(shape[0], 1)), nn.Parameter(torch.zeros(1, shape[1]))
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))

    def scores(self, weight: Tensor) -> Tensor:
        return weight.abs() + self.rows + self.columns

    def forward(self, weight: Tensor) -> Tensor:
        return weight * straight_through(self.mask, self.scores(weight))


@dataclass(frozen=True)
class LearnedScores(TrainingMethod):
    """The weights are frozen; what is learned is which of them stay."""

    name: ClassVar[str] = "reference_learned_scores"

    def schedule(self, steps: int) -> Schedule:
        return Linear.of(steps, cooldown=0.3)

    def attach(self, training: Training) -> Sequence[Attachment]:
        return [Attachment(target, Scored(target.shape)) for target in training.targets]

    def trainable(self, names: Sequence[str], training: Training) -> list[str]:
        return [name for name in names if name.endswith((".rows", ".columns"))]

    def after_step(self, training: Training) -> None:
        for target in training.targets:
            scores = training.modules(target)[0].scores(training.parameter(target))
            training.prune(target, masks.per_row(scores, training.budget))

    def finish(self, training: Training) -> Mapping[str, Decision]:
        with torch.no_grad():
            self.after_step(training)
        return super().finish(training)


@dataclass(frozen=True)
class NoisyHeads(TrainingMethod):
    """Heads whose factor is mostly noise go; the information that the others carry costs something."""

    cost: float = 1e-3
    name: ClassVar[str] = "reference_noisy_heads"

    @property
    def units(self) -> Sequence[Unit]:
        return ("heads",)

    def attach(self, training: Training) -> Sequence[Attachment]:
        return [Attachment(target, NoiseGate(target.units), "units") for target in training.targets]

    def options(self, name: str) -> Mapping[str, Any]:
        return {"scale": 5.0, "weight_decay": 0.0} if name.endswith(("mean", "log_variance")) else {}

    def loss(self, batch: Batch, outputs: Any, teacher: Any, training: Training) -> Tensor:
        gates = [module for target in training.targets for module in training.modules(target)]
        return outputs.loss + self.cost * sum(gate.divergence() for gate in gates)

    def finish(self, training: Training) -> Mapping[str, Decision]:
        found = {}
        for target in training.targets:
            scores = -training.modules(target)[0].log_alpha().detach()
            found[target.name] = Decision(masks.per_row(scores, training.budget))
        return found


@dataclass(frozen=True)
class SharpeningGates(TrainingMethod):
    """Gates of channels that turn into a step function, and are frozen before they do."""

    name: ClassVar[str] = "reference_sharpening_gates"

    @property
    def units(self) -> Sequence[Unit]:
        return ("channels",)

    def schedule(self, steps: int) -> Schedule:
        return Temperature(steps)

    def attach(self, training: Training) -> Sequence[Attachment]:
        return [Attachment(target, Gate(target.units), "units") for target in training.targets]

    def before_step(self, batch: Callable[[], Batch], training: Training) -> None:
        for target in training.targets:
            training.modules(target)[0].temperature = training.schedule(training.step)

    def trainable(self, names: Sequence[str], training: Training) -> list[str]:
        frozen = training.step >= training.schedule.last
        return [name for name in names if not (frozen and name.endswith("logit"))]

    def finish(self, training: Training) -> Mapping[str, Decision]:
        scores = {target.name: training.modules(target)[0].logit.detach() for target in training.targets}
        return {name: Decision(masks.per_row(score, training.budget)) for name, score in scores.items()}


@dataclass(frozen=True)
class DistilledQuantiser(TrainingMethod):
    """Weights and activations of few bits learn from an unquantised teacher; nothing is pruned."""

    bits: int = 4
    name: ClassVar[str] = "reference_distilled_quantiser"
    services: ClassVar[tuple[str, ...]] = ("teacher",)

    def attach(self, training: Training) -> Sequence[Attachment]:
        found = []
        for target in training.targets:
            found += [Attachment(target, FakeQuantised(self.bits)), Attachment(target, FakeQuantised(8), "input")]
        return found

    def loss(self, batch: Batch, outputs: Any, teacher: Any, training: Training) -> Tensor:
        return 0.5 * outputs.loss + 0.5 * distillation(outputs.logits, teacher.logits, 2.0)

    def finish(self, training: Training) -> Mapping[str, Decision]:
        found = {}
        for target in training.targets:
            code = training.modules(target)[0].code(training.parameter(target))
            found[target.name] = Decision(torch.ones(target.shape, dtype=torch.bool), code=code)
        return found


@dataclass(frozen=True)
class SampledLayers(TrainingMethod):
    """Low-rank factors of one block at a time learn, of the block whose damped change costs most; nothing is pruned."""

    rank: int = 2
    every: int = 2
    name: ClassVar[str] = "reference_sampled_layers"

    def schedule(self, steps: int) -> Schedule:
        return Constant()

    def covers(self, target: Target) -> bool:
        return target.role.endswith(("q_proj", "v_proj"))

    def attach(self, training: Training) -> Sequence[Attachment]:
        return [low_rank(training, target, self.rank) for target in training.targets]

    def start(self, training: Training) -> None:
        training.memory["cost"] = torch.zeros(len(training.adapter.blocks))

    def before_step(self, batch: Callable[[], Batch], training: Training) -> None:
        if training.step % self.every:
            return
        trial = batch()
        for block in range(len(training.adapter.blocks)):
            factors = [training.low_rank(target) for target in training.targets if target.block == block]
            for factor in factors:
                factor.gain = 0.25
            training.memory["cost"][block] += training.loss(trial)
            for factor in factors:
                factor.gain = 1.0

    def trainable(self, names: Sequence[str], training: Training) -> list[str]:
        block = int(torch.multinomial(training.memory["cost"].softmax(0), 1, generator=training.rng))
        return [name for t in training.targets if t.block == block for name in training.learned(t)]

    def finish(self, training: Training) -> Mapping[str, Decision]:
        return {target.name: Decision(torch.ones(target.shape, dtype=torch.bool)) for target in training.targets}


REFERENCES: tuple[TrainingMethod, ...] = (
    GradualMagnitude(), RandomMasks(), LearnedScores(), LowRankChannels(), NoisyHeads(), SharpeningGates(),
    DistilledQuantiser(), SampledLayers(),
)  # fmt: skip
