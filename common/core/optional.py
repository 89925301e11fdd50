"""Libraries that are not among the requirements."""

from __future__ import annotations

import importlib
from typing import Any

from prunelab.common.core.errors import PrunelabError


def optional(module: str, what: str) -> Any:
    """A library that reads a kind of file. Raises PrunelabError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise PrunelabError(f"{what} is read with {package}; install it (pip install {package})") from None
