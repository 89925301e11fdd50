"""Runs of a model that differ from the one before in later blocks alone go on from the states in front of those."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from prunelab.common.weights.adapters.base import WeightAdapter
from prunelab.common.weights.calibration import standing_in

SHARE = 1 / 4  # of the bytes of the weights, that the states which are kept may take


class Prefixes:
    """The states in front of some blocks, as evenly spread as their bytes allow, of the last run of every sample.

    What is run is told by what was changed of each block: `changes`, by block. A run takes up the last state in front
    of the first block whose changes are not those of the run before, and gives the same values to the bit.
    """

    def __init__(self, adapter: WeightAdapter, samples: Sequence[Any]) -> None:
        self.adapter = adapter
        self.samples = samples
        self._changes: dict[int, Mapping[int, Hashable]] = {}  # of the last run, by the id of the sample
        self._states: dict[int, dict[int, Tensor]] = {}  # by block

    @contextmanager
    def reused(self, sample: Any, changes: Mapping[int, Hashable], until: int | None = None) -> Iterator[None]:
        """One run of the model on one of the samples inside the `with` block. until: the first block, if any, whose
        changes will not be made again, so that no state behind it is of use."""
        if len(self.adapter.chains) > 1 or not any(sample is known for known in self.samples):
            yield
            return
        states = self._states.setdefault(id(sample), {})
        before = self._changes.pop(id(sample), None)
        last = -1 if before is None else _first_difference(before, changes, len(self.adapter.blocks))
        for block in [block for block in states if block > last]:
            del states[block]
        start = max(states, default=0)
        with ExitStack() as stack:
            for block in range(start):
                following = states[start] if block == start - 1 else None
                stack.enter_context(standing_in(self.adapter.blocks[block], _giving(following)))
            for block in range(len(self.adapter.blocks))[start + 1 : None if until is None else until + 1]:
                hook = self._note(states, block)
                stack.callback(self.adapter.blocks[block].register_forward_pre_hook(hook).remove)
            yield
        self._changes[id(sample)] = dict(changes)

    def _note(self, states: dict[int, Tensor], block: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and block % self._apart(args[0]) == 0:
                states[block] = args[0]

        return note

    def _apart(self, state: Tensor) -> int:
        """Blocks between two states that are kept, of every sample alike."""
        each, blocks = state.numel() * state.element_size() * len(self.samples), len(self.adapter.blocks)
        return max(1, math.ceil(blocks * each / self._room)) if each <= self._room else blocks

    @cached_property
    def _room(self) -> float:
        return SHARE * sum(p.numel() * p.element_size() for p in self.adapter.model.parameters())


def _first_difference(one: Mapping[int, Hashable], other: Mapping[int, Hashable], blocks: int) -> int:
    """The first block that two runs change differently, -1 if that comes before all blocks."""
    return min((block for block in {*one, *other} if one.get(block) != other.get(block)), default=blocks)


def _giving(state: Tensor | None) -> Callable[..., Tensor]:
    """What stands for a block that is passed over: a state in front of the next, or what it is given."""
    return lambda hidden, *args, **kwargs: hidden if state is None else state
