"""Hyper-parameters: every number of every method has a range, and what lies outside is refused before work starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

from prunelab.common.core import index, options, registry
from prunelab.common.core.errors import PrunelabError

NAMES = sorted(index.entries())


def wrong(hint: Any) -> Iterator[Any]:
    """Values that a type does not admit."""
    parts, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        yield "no such choice"
    elif hint is bool:
        yield "maybe"
    elif origin is Annotated:
        yield 0.5 if parts[0] is int else float("nan")
        if parts[0] is int and hint is not options.AnyInt:
            yield -(10**9)
        yield "many"
    elif origin is tuple and Ellipsis not in parts:
        yield tuple(next(wrong(part)) for part in parts)
    elif parts:  # a union, or a tuple of any length
        for value in wrong(parts[0]):
            yield (value,) if origin is tuple else value


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_range(name):
    for option in index.entries()[name].options:
        assert not options.unbounded(option.hint), (
            f"{name}: annotate {option.name} with a type of common/core/options.py, such as NonNegativeInt or Share"
        )


@pytest.mark.parametrize("name", NAMES)
def test_what_the_source_says_is_what_python_sees(name):
    hints = get_type_hints(registry.get(name), include_extras=True)
    for option in index.entries()[name].options:
        assert option.hint in (Any, hints[option.name]), option.name


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_outside_is_refused(name):
    entry = index.entries()[name]
    for option in entry.options:
        for value in wrong(option.hint):
            with pytest.raises(PrunelabError, match=f"{name}: {option.name} must be "):
                registry.get(name)(**{option.name: value})
            with pytest.raises(PrunelabError, match=f"{name}: {option.name} must be "):
                registry.fit(entry, {option.name: value})
