"""What is measured at the targets of one block while the calibration set passes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.targets import Accumulator, Observation, Target, Unit

Factories = Mapping[str, Callable[[Target], Accumulator]]


class Asking(Protocol):
    """Whoever asks for statistics: a method, or `Wanted`."""

    def statistics(self, unit: Unit) -> Factories:
        """See `WeightPruner.statistics`."""


@dataclass(frozen=True)
class Wanted:
    """Statistics asked for by unit and name."""

    by_unit: Mapping[Unit, Factories]

    def statistics(self, unit: Unit) -> Factories:
        return self.by_unit.get(unit, {})


class Accumulators:
    """The accumulators of one block's targets; those of one source share what reads inputs alone."""

    def __init__(self, method: Asking, targets: Iterable[Target]) -> None:
        self.made: dict[str, dict[str, Accumulator]] = {}
        self.owned: list[tuple[Target, list[Accumulator]]] = []  # each accumulator once, with a target that feeds it
        shared: dict[tuple[str, str, str], Accumulator] = {}
        for target in targets:
            made, own = self.made.setdefault(target.name, {}), []
            for name, factory in method.statistics(target.unit).items():
                key = (target.source or target.name, target.unit, name)
                if key in shared:
                    made[name] = shared[key]
                    continue
                made[name] = factory(target)
                own.append(made[name])
                if made[name].shared:
                    shared[key] = made[name]
            if own:
                self.owned.append((target, own))
        self._values: dict[int, Tensor] = {}

    def taps(self, adapter: WeightAdapter) -> list[str]:
        """Modules to listen to."""
        return [path for target, _ in self.owned for path in adapter.taps(target)]

    def visit(self, observe: Callable[[Target], Observation]) -> None:
        """Take in one sequence."""
        for target, accumulators in self.owned:
            observation = observe(target)
            for accumulator in accumulators:
                accumulator.update(observation)

    def values(self, target: Target) -> dict[str, Tensor]:
        """The statistics of a target by name."""
        results = {}
        for name, accumulator in self.made[target.name].items():
            if id(accumulator) not in self._values:
                try:
                    self._values[id(accumulator)] = accumulator.value()
                except PrunelabError as error:  # a singular Hessian, say: which layer's it is only known here
                    raise PrunelabError(f"{target.name}: {error}") from None
            results[name] = self._values[id(accumulator)]
        return results
