"""Releases of libraries whose internals the adapters hook into, as far as the tests were run on them."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version

# First and last minor release. `make test-versions` proves those of transformers; torch is the one that is locked.
PROVEN = {"transformers": ("5.20", "5.24"), "torch": ("2.12", "2.12")}
FIRST = {
    "transformers": "run `make test-versions VERSIONS={}` first",
    "torch": "run the tests with {} first (`pytest tests/unit tests/contract`)",
}


@cache
def warn_outside(library: str) -> None:
    """One line of warning, once a process, where the installed release is none that the tests were run on."""
    first, last = PROVEN[library]
    installed = version(library)
    installed = installed.partition("+")[0]  # of builds for a GPU
    minor = tuple(int(part) for part in installed.split(".")[:2])
    if not tuple(map(int, first.split("."))) <= minor <= tuple(map(int, last.split("."))):
        warnings.warn(
            f"{library} {installed} is outside {first} to {last}, which Prunelab was tested with; install one of these,"
            f" or {FIRST[library].format(installed)}",
            stacklevel=2,
        )
