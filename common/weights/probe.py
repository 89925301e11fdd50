"""Measurements on the whole unpruned model, for methods that decide on the ground of all of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.accumulators import Accumulators, Factories, Wanted
from prunelab.common.weights.adapters.base import View, WeightAdapter
from prunelab.common.weights.calibration import Stream, finite, tapped
from prunelab.common.weights.targets import Accumulator, Decision, Target, Unit, WeightSignals


class ModelProbe:
    """See `prunelab.common.weights.targets.Probe`."""

    def __init__(
        self,
        adapter: WeightAdapter,
        targets: Sequence[Target],
        samples: Sequence[Tensor],
        budget: Budget = Budget(1.0),  # noqa: B008  frozen
        signals: Callable[[Target], WeightSignals] | None = None,
    ) -> None:
        self.adapter = adapter
        self.targets = targets
        self.samples = samples
        self.budget = budget
        self._signals = signals

    def signals(self, target: Target) -> WeightSignals:
        return WeightSignals(self.weights(target)) if self._signals is None else self._signals(target)

    def weights(self, target: Target) -> Mapping[str, Tensor]:
        return self.adapter.weights(target)

    @contextmanager
    def trial(self, decisions: Iterable[tuple[Target, Decision]]) -> Iterator[None]:
        undo: list[Callable[[], None]] = []
        try:
            for target, decision in decisions:
                undo.append(self.adapter.attempt(target, decision))
            yield
        finally:
            for back in reversed(undo):
                back()

    def loss(self, sample: Tensor) -> Tensor:
        return self.adapter.loss(sample)

    def logits(self, sample: Tensor) -> Tensor:
        logits: Tensor = self.adapter.run(sample).logits
        return logits.flatten(0, -2)

    def statistics(self, wanted: Mapping[Unit, Factories]) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        stream = Stream(self.adapter, self.samples)
        for block in range(len(self.adapter.blocks)):
            targets = [target for target in self.targets if target.block == block]
            accumulators = Accumulators(Wanted(wanted), targets)
            stream.through(block, accumulators.taps(self.adapter), accumulators.visit)
            found |= {target.name: accumulators.values(target) for target in targets}
        return found

    def hidden_states(self, sample: Tensor, normed: bool = True) -> list[Tensor]:
        blocks = [self.adapter.prefix(block) for block in range(len(self.adapter.blocks))]
        last = self.adapter.norm if normed and self.adapter.norm else blocks[-1]
        with tapped(self.adapter.model, [*blocks, last]) as seen:
            self.adapter.run(sample)
        states = [*(seen[block][0][0] for block in blocks), seen[last][1]]
        return [state.flatten(0, -2) for state in states]

    def gradients(
        self, factories: Mapping[str, Callable[[Target], Accumulator]], together: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        """Each gradient is dropped as soon as it was read, so that one parameter's is held at a time."""
        made: dict[str, dict[str, Accumulator]] = defaultdict(dict)
        by_parameter: dict[nn.Parameter, list[tuple[str, View, list[Accumulator]]]] = defaultdict(list)
        for target in self.targets:
            for role, (parameter, view) in self.adapter.holders(target).items():
                member = target if target.loose else replace(target, role=role)
                own = {name: factory(member) for name, factory in factories.items()}
                by_parameter[parameter].append((target.name, view, list(own.values())))
                made[target.name] |= {name if target.loose else f"{name}.{role}": a for name, a in own.items()}

        def read(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
            if not finite(parameter.grad):
                name = by_parameter[parameter][0][0]
                raise PrunelabError(f"the gradient of {name} holds NaN or infinite values; use a wider dtype")
            for _, view, accumulators in by_parameter[parameter]:
                for accumulator in accumulators:
                    accumulator.update(view(parameter.grad))
            parameter.grad = None

        with _only_these_learn(self.adapter.model, set(by_parameter)), torch.enable_grad():
            handles = [parameter.register_post_accumulate_grad_hook(read) for parameter in by_parameter]
            try:
                if together:
                    torch.stack([self.loss(sample) for sample in self.samples]).mean().backward()
                for sample in () if together else self.samples:
                    self.loss(sample).backward()
            finally:
                for handle in handles:
                    handle.remove()
        return {name: {key: a.value() for key, a in accumulators.items()} for name, accumulators in made.items()}


@contextmanager
def _only_these_learn(model: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; the model's own settings and gradients come back at the end."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(parameter in parameters)
    try:
        yield
    finally:
        for parameter, learns, gradient in before:
            parameter.requires_grad_(learns)
            parameter.grad = gradient
