"""Models of several components, such as the pipelines of diffusers: each has an adapter of its own, and their targets
stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import Chain, Shelf, Tap, View, WeightAdapter
from prunelab.common.weights.adapters.projections import Projection
from prunelab.common.weights.targets import Decision, Observation, Target, Unit


class Linears(WeightAdapter):
    """Any module, of which nothing is known but its linears: a component of a pipeline. It is one block; a calibration
    sample holds the arguments of one call by name, or is the first of them."""

    family = "linears"
    by_call = True

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [self.model]

    def prefix(self, block: int) -> str:
        return ""

    def run(self, sample: Any) -> Any:
        if isinstance(sample, Mapping):
            first, *rest = sample
            return self.model(sample[first], **{name: sample[name] for name in rest})
        return self.model(sample)

    def call(self, sample: Any) -> Any:
        return id(sample)

    def check_sample(self, sample: Any) -> None:
        if isinstance(sample, Mapping) and not all(isinstance(name, str) for name in sample):
            raise PrunelabError("a calibration sample of a component holds the arguments of one call by name")

    def finish(self) -> bool:
        return False

    def taps(self, target: Target) -> tuple[str, ...]:
        return (target.role,)

    def observe(self, target: Target, seen: Mapping[str, Tap], before: Any, after: Any, tokens: Any) -> Observation:
        inputs = seen[target.role][0][0].flatten(0, -2)
        return Observation(inputs, self.weights(target), before, after, tokens)

    def remove(self, target: Target, kept: Tensor) -> None:
        raise PrunelabError(f"nothing is known here of the structures of a {type(self.model).__name__}")


class Components(WeightAdapter):
    """Named adapters as one. Blocks are numbered through; names of targets begin with their component's."""

    family = "components"

    def __init__(self, parts: Mapping[str, WeightAdapter]) -> None:
        super().__init__(nn.ModuleDict({name: adapter.model for name, adapter in parts.items()}))
        self.parts = dict(parts)
        starts = torch.tensor([0, *(len(adapter.blocks) for adapter in parts.values())]).cumsum(0).tolist()
        self.starts = dict(zip(parts, starts, strict=False))
        self._own: dict[str, tuple[WeightAdapter, Target]] = {}

    @property
    def chains(self) -> tuple[Chain, ...]:
        return tuple(
            Chain(name, self.starts[name], self.starts[name] + len(adapter.blocks), adapter)
            for name, adapter in self.parts.items()
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [block for adapter in self.parts.values() for block in adapter.blocks]

    def _of(self, block: int) -> tuple[str, WeightAdapter, int]:
        """The component of a block, its adapter, and the block's number there."""
        name = [name for name, start in self.starts.items() if start <= block][-1]
        return name, self.parts[name], block - self.starts[name]

    def prefix(self, block: int) -> str:
        name, adapter, own = self._of(block)
        return f"{name}.{adapter.prefix(own)}".removesuffix(".")

    def run(self, sample: Any) -> Any:
        raise PrunelabError("the components of a model run apart; give an objective, a function of model and samples")

    def check_sample(self, sample: Any) -> None:
        raise PrunelabError(f"name the component a calibration set is for, one of {', '.join(self.parts)}")

    def targets(self, unit: Unit) -> list[Target]:
        results = []
        for name, adapter in self.parts.items():
            for own in adapter.targets(unit):
                block = own.block + self.starts[name] if own.block >= 0 else -1
                source = f"{name}.{own.source}" if own.source else ""
                target = replace(own, name=f"{name}.{own.name}", block=block, source=source, component=name)
                self._own[target.name] = adapter, own
                results.append(target)
        return results

    def config(self) -> dict[str, Any]:
        return {name: adapter.config() for name, adapter in self.parts.items()}

    def finish(self) -> bool:
        for adapter in self.parts.values():
            adapter.finish()
        return False  # no single config describes them

    def received(self, block: int, run: Callable[[], Any]) -> Tensor:
        _, adapter, own = self._of(block)
        return adapter.received(own, run)

    # -- what follows is the component's own -------------------------------------------------------------------------

    def own(self, target: Target) -> tuple[WeightAdapter, Target]:
        """The adapter of a target's component, and what the target is called there."""
        if target.name not in self._own:
            self.targets(target.unit)
        return self._own[target.name]

    def taps(self, target: Target) -> tuple[str, ...]:
        adapter, own = self.own(target)
        return adapter.taps(own)

    def observe(self, target: Target, seen: Mapping[str, Tap], before: Any, after: Any, tokens: Any) -> Observation:
        adapter, own = self.own(target)
        return adapter.observe(own, seen, before, after, tokens)

    def parameter(self, target: Target) -> nn.Parameter:
        adapter, own = self.own(target)
        return adapter.parameter(own)

    def view(self, target: Target, tensor: Tensor) -> Tensor:
        adapter, own = self.own(target)
        return adapter.view(own, tensor)

    def holders(self, target: Target) -> dict[str, tuple[nn.Parameter, View]]:
        adapter, own = self.own(target)
        return adapter.holders(own)

    def structure(self, target: Target) -> dict[str, Tensor]:
        adapter, own = self.own(target)
        return adapter.structure(own)

    def weights(self, target: Target) -> dict[str, Tensor]:
        adapter, own = self.own(target)
        return adapter.weights(own)

    def readers(self, target: Target) -> list[Projection]:
        adapter, own = self.own(target)
        return adapter.readers(own)

    def check(self, target: Target, decision: Decision) -> None:
        adapter, own = self.own(target)
        adapter.check(own, decision)

    def write(self, target: Target, decision: Decision) -> None:
        adapter, own = self.own(target)
        adapter.write(own, decision)

    def attempt(self, target: Target, decision: Decision, dense: Shelf | None = None) -> Callable[[], None]:
        adapter, own = self.own(target)
        return adapter.attempt(own, decision, dense)

    def remove(self, target: Target, kept: Tensor) -> None:
        adapter, own = self.own(target)
        adapter.remove(own, kept)
