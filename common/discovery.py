"""Finding classes by where they stand and choosing one by name: methods, adapters and testbeds keep no list."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import TypeVar

from common.errors import PrunelabError

T = TypeVar("T")


def defined(module: ModuleType, base: type[T]) -> Iterator[type[T]]:
    """The concrete subclasses of `base` that a module itself defines."""
    for value in vars(module).values():
        own = inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
        if own and not inspect.isabstract(value):
            yield value


def choose(known: Mapping[str, T], name: str, what: str) -> T:
    """The entry of that name, or an error that suggests the nearest names."""
    if name not in known:
        near = get_close_matches(name, known, 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        raise PrunelabError(f"there is no {what} '{name}'; {hint}")
    return known[name]
