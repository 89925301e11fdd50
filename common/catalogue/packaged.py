"""Checkpoints that an installed package brings: where the file lies, and whether it is the one that was named.

An entry names the package, the file in it and its sha256, and nothing else is needed for another one. Imports no torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import file_digest, inside

INSTALL = 'pip install -e ".[real]"'


def version(package: str) -> str | None:
    """The version of a package that is installed; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _place(entry: Mapping[str, Any]) -> Path | None:
    try:
        root = importlib.metadata.distribution(entry["package"]).locate_file("")
    except importlib.metadata.PackageNotFoundError:
        return None
    return inside(Path(str(root)), entry["file"])


def missing(entry: Mapping[str, Any]) -> str:
    """What it takes to have an entry's file here, in words; '' where there is a file of that name."""
    place = _place(entry)
    return "" if place is not None and place.is_file() else f"the package {entry['package']} ({INSTALL})"


def file(identity: Mapping[str, Any]) -> Path:
    """The file that an identity names, once its content is known to be the one that the identity's sha256 is of.

    Raises PrunelabError where the package is missing, or brings another file.
    """
    place = _place(identity)
    if place is None or not place.is_file():
        raise PrunelabError(f"{identity['file']} comes with the package {identity['package']}; {INSTALL}")
    stat = place.stat()
    if _digest(place, stat.st_size, stat.st_mtime_ns) != identity["sha256"]:
        raise PrunelabError(
            f"{place.name} of the package {identity['package']} is not the file that configs/models.yaml names;"
            f" pip uninstall {identity['package']}, then {INSTALL}"
        )
    return place


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """The sha256 of a file that nobody touched since."""
    return file_digest(path)
