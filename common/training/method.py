"""The role of methods that learn, while a model trains, what one-shot pruning decides at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.training import peft
from prunelab.common.training.parametrizations import Attachment, EightBit, LowRank, Mask
from prunelab.common.training.schedule import Constant, Schedule
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.adapters.projections import oriented
from prunelab.common.weights.targets import Decision, Target, Unit

Batch = Mapping[str, Any]


@dataclass
class Training:
    """A training as its method sees it.

    targets: what the method covers, in forward order; linears: all linears of the model. step counts from 0, of
    `steps`; behind the last one it equals `steps`. memory: tensors of the method's own by name, which checkpoints keep.
    rng: draws that go on where they stood. services: second models by name.
    """

    adapter: WeightAdapter
    targets: Sequence[Target]
    linears: Sequence[Target]
    target_budget: Budget
    schedule: Schedule
    steps: int
    objective: Callable[[nn.Module, Batch], Any]
    services: Mapping[str, Any] = field(default_factory=dict)
    rng: torch.Generator = field(default_factory=torch.Generator)
    memory: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    attachments: Sequence[Attachment] = ()

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.adapter.model
        return model

    @property
    def budget(self) -> Budget:
        """What the schedule makes of the budget at this step."""
        return self.schedule.budget(self.step, self.target_budget)

    def modules(self, target: Target) -> list[Any]:
        """What the method put on a target."""
        return [a.module for a in self.attachments if a.target.name == target.name and a.target.unit == target.unit]

    def low_rank(self, target: Target) -> LowRank | peft.Factors:
        """The low-rank factors on the weight of a linear: the method's, or those that peft gave it."""
        return next(module for module in self.modules(target) if isinstance(module, LowRank | peft.Factors))

    def weight(self, target: Target) -> Tensor:
        """The weight of a linear [out, in] or another tensor, as the forward pass uses it."""
        owner, name = self._owner(target)
        weight = self._seen(target, getattr(owner, name).detach())
        return weight + peft.Factors(owner).delta().detach() if peft.has_factors(owner) else weight

    def parameter(self, target: Target) -> Tensor:
        """The parameter underneath `weight`, on which the method put something or not; where it is held in codes of
        eight bits, what these stand for."""
        owner, name = self._owner(target)
        mapped = getattr(owner, "parametrizations", {})
        lowest = mapped[name][0] if name in mapped else None
        held = self.original(target).detach()
        return self._seen(target, lowest(held) if isinstance(lowest, EightBit) else held)

    def gradient(self, target: Target) -> Tensor:
        """The gradient of that parameter."""
        gradient = self.original(target).grad
        assert gradient is not None, f"{target.name} does not learn"
        return self._seen(target, gradient)

    def _owner(self, target: Target) -> tuple[Any, str]:
        path, _, name = (target.name if target.unit == "tensor" else f"{target.name}.weight").rpartition(".")
        return self.model.get_submodule(path), name

    def original(self, target: Target) -> nn.Parameter:
        """The parameter that holds the weight, under whatever lies on it."""
        owner, name = self._owner(target)
        mapped = getattr(owner, "parametrizations", {})
        parameter: nn.Parameter = mapped[name].original if name in mapped else getattr(owner, name)
        return parameter

    def _seen(self, target: Target, tensor: Tensor) -> Tensor:
        return oriented(self._owner(target)[0], tensor) if target.unit == "linear" else tensor

    def mask(self, target: Target) -> Tensor:
        """The mask on a target, True where a unit stays."""
        return self._mask(target).mask

    def prune(self, target: Target, mask: Tensor) -> None:
        """Set the mask on a target: the buffer `mask` of what the method put there. From the next forward pass on the
        rest of it is zero."""
        self._mask(target).mask.copy_(mask)

    def _mask(self, target: Target) -> Any:
        return next(module for module in self.modules(target) if isinstance(getattr(module, "mask", None), Tensor))

    def removed(self) -> Tensor | float:
        """Parameters that masks hold at zero, on the model's device."""
        masks = [(a.target.size, getattr(a.module, "mask", None)) for a in self.attachments]
        return sum((size * (~mask).sum() for size, mask in masks if isinstance(mask, Tensor)), 0.0)

    def learned(self, target: Target) -> list[str]:
        """Names of the parameters that the method put on a target."""
        own = {id(parameter) for module in self.modules(target) for parameter in module.parameters()}
        return [name for name, parameter in self.model.named_parameters() if id(parameter) in own]

    def loss(self, batch: Batch) -> Tensor:
        """The plain loss of a batch in eval mode, for methods that try something out between steps."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                loss: Tensor = self.objective(self.model, batch).loss
        finally:
            self.model.train(training)
        return loss


class TrainingMethod(Method):
    """Learns masks, gates, low-rank factors or quantisers while a model trains.

    The hooks are called in the order in which they stand here. What a method must remember between steps lies in
    `training.memory` or in buffers of what it attached, so that a training can go on after an interruption.
    `services` may name `teacher`, a second model that reads every batch.
    """

    role: ClassVar[str] = "training_method"

    @property
    def units(self) -> Sequence[Unit]:
        """What the method decides on."""
        return ("linear",)

    def covers(self, target: Target) -> bool:
        """Whether the method touches a target of its units."""
        return True

    def targets(self, adapter: WeightAdapter) -> list[Target]:
        """What the method decides on in a model, in forward order."""
        targets = []
        for unit in self.units:
            of_unit = adapter.targets(unit)
            if not of_unit:
                raise PrunelabError(f"{self.name} prunes {unit}, and this {type(adapter.model).__name__} has none")
            targets += [target for target in of_unit if self.covers(target)]
        if not targets:
            raise PrunelabError(f"{self.name} covers none of this model's targets; change its options")
        adapter.refuse_tied(targets)
        return sorted(targets, key=lambda target: target.block if target.block >= 0 else len(adapter.blocks))

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the method cannot train."""
        model = peft.base(model)
        with peft.without_factors(model):
            self.targets(weight_adapter(model))

    def schedule(self, steps: int) -> Schedule:
        """How the budget is approached over a training; by default it holds from the start."""
        return Constant()

    def attach(self, training: Training) -> Sequence[Attachment]:
        """What is put on the model before the first step; by default a mask on every target. Draws of new parameters
        come from torch's global generator."""
        return [masked(target) for target in training.targets]

    def around(self, training: Training) -> AbstractContextManager[Any]:
        """A `with` block around the training, entered once everything is attached: what watches or replaces attention,
        say."""
        return nullcontext()

    def start(self, training: Training) -> None:
        """Once everything is attached, before the first step."""

    def before_step(self, batch: Callable[[], Batch], training: Training) -> None:
        """Ahead of a step. `batch()` draws a further batch, for methods that try something out."""

    def trainable(self, names: Sequence[str], training: Training) -> Collection[str]:
        """Which of the model's parameters learn at this step, by name; by default all."""
        return names

    def options(self, name: str) -> Mapping[str, Any]:
        """Settings of the optimiser that a parameter has for itself: `scale` (of the learning rate), `weight_decay`,
        `maximize`."""
        return {}

    def arguments(self) -> Mapping[str, Any]:
        """What the model's forward, and the teacher's, is given beside the batch, such as `output_hidden_states`."""
        return {}

    def loss(self, batch: Batch, outputs: Any, teacher: Any, training: Training) -> Tensor:
        """The loss of a batch, from the model's outputs and the teacher's (None without one)."""
        loss: Tensor = outputs.loss
        return loss

    def after_backward(self, training: Training) -> None:
        """Gradients are there, clipped; the weights have not moved."""

    def after_step(self, training: Training) -> None:
        """The weights have moved."""

    def finish(self, training: Training) -> Mapping[str, Decision]:
        """The decision on every target by name; by default the masks. What a decision leaves out keeps the values that
        it has learned."""
        return {target.name: Decision(training.mask(target).clone()) for target in training.targets}


def masked(target: Target) -> Attachment:
    """A mask on a target."""
    return Attachment(target, Mask(target.shape), "weight" if target.loose else "units")


def low_rank(training: Training, target: Target, rank: int, scale: float = 1.0) -> Attachment:
    """Low-rank factors on the weight of a linear; where peft gave it some, these, whatever their rank."""
    layer = training.model.get_submodule(target.name)
    return Attachment(target, peft.Factors(layer) if peft.has_factors(layer) else LowRank(target.shape, rank, scale))
