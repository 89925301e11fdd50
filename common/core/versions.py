"""Releases of libraries whose internals the adapters hook into, as far as the tests were run on them."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version

PROVEN = {"transformers": ("5.20", "5.24")}  # first and last minor release; `make test-versions` proves both


@cache
def warn_outside(library: str) -> None:
    """One line of warning, once a process, where the installed release is none that the tests were run on."""
    first, last = PROVEN[library]
    installed = version(library)
    minor = tuple(int(part) for part in installed.split(".")[:2])
    if not tuple(map(int, first.split("."))) <= minor <= tuple(map(int, last.split("."))):
        warnings.warn(
            f"{library} {installed} is outside {first} to {last}, which Prunelab was tested with; install one of these,"
            f" or run `make test-versions VERSIONS={installed}` first",
            stacklevel=2,
        )
