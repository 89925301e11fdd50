"""Hooks that come out again, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from prunelab.common.core.plan import Gather, Mix


def run_all(removers: list[Callable[[], Any]]) -> None:
    """Call every function of the list, the last first, and empty it."""
    while removers:
        removers.pop()()


def padded_first(reduce: Gather | Mix) -> Gather | Mix:
    """The same outputs in the same order, but with those that do not count in front: the last one is then last in
    every sample, which is where `generate` reads the next token."""
    if reduce.valid is None:
        return reduce
    order = reduce.valid.int().argsort(dim=1, stable=True)
    valid = reduce.valid.gather(1, order)
    if isinstance(reduce, Gather):
        return Gather(reduce.index.gather(1, order), valid)
    return replace(reduce, target=order.argsort(1).gather(1, reduce.target), valid=valid)
