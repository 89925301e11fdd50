"""Run records: one JSON file a run, addressed by what was run and by the sources that ran it. Imports no torch.

The address is `<identity>-<sources>`: identity hashes the resolved parameters, model and data ids; sources hashes
the method's and the task's files with everything they import from this project. Commit, versions, device and
timings are metadata and not part of it. A checksum over the content detects tampered or truncated records.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import PrunelabError

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
_LIBRARIES = (
    "torch", "torchvision", "timm", "transformers", "numpy", "scipy", "scikit-learn", "rouge-score", "faster-coco-eval",
)  # fmt: skip


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- sources ---------------------------------------------------------------------------------------------------------


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Files of this project that a file imports, read from its text; packages count with their __init__."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("common", "methods"):
                base = ROOT.joinpath(*name.split("."))
                found.update(p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file())
    return frozenset(found)


def closure(entries: Iterable[Path]) -> tuple[Path, ...]:
    """The entry files and everything of this project they import, directly or not."""
    seen: set[Path] = set()
    todo = list(entries)
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo.extend(_imports(path))
    return tuple(sorted(seen))


@cache
def file_hash(path: Path) -> str:
    """sha256 of a file's content, as this process first saw it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sources(entries: Iterable[Path]) -> str:
    """One hash of the closure of the entry files."""
    return _sources(tuple(entries))


@cache  # thousands of runs share a few dozen sets of entry files
def _sources(entries: tuple[Path, ...]) -> str:
    return digest({str(p.relative_to(ROOT)): file_hash(p) for p in closure(entries)})


# -- records ---------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """How the run was made: code version, libraries, machine. Metadata, not part of the address."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "machine": platform.machine(), "libraries": versions, **_commit()}


@cache
def _commit() -> dict[str, Any]:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all, with its checksum."""
    content = {"format": FORMAT, **record}
    content["checksum"] = digest(content)
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises PrunelabError where the disk is full or read-only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> PrunelabError:
    """What to do about a file or folder that cannot be written, in one line."""
    return PrunelabError(f"cannot write {path} ({error.strerror}); make room there, or give --config results=DIR")


def read(path: Path) -> dict[str, Any]:
    """A record, verified. Raises PrunelabError where it is truncated, altered or not the one its name says."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("checksum")
        intact = digest(record) == checksum and f"{record['identity']}-{record['sources']}" == path.stem
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise PrunelabError(f"the run record {path} is damaged; delete it, and the next run makes it anew")
    return record


def reject_damaged(path: Path) -> bool:
    """Set a damaged record aside (as *.rejected), so that it is made anew. True where that was needed."""
    if not path.exists():
        return False
    try:
        read(path)
    except PrunelabError:
        path.replace(path.with_suffix(".rejected"))
        return True
    return False
