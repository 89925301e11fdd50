"""Run records: one JSON file a run, addressed by what was run and by the sources that ran it. Imports no torch.

The address is `<identity>-<sources>`: identity hashes the resolved parameters, model and data ids; sources hashes the
code of what runs it (`planning.entries`) with everything that it imports from this project. Whatever decides an
outcome is in one of the two, and what does not is in neither: comments, docstrings, and the rooms of `SILENT`. Commit,
versions, device and timings are metadata. A checksum over the content detects tampered or truncated records.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT, digest, file_digest, write_text

FORMAT = 1

# Rooms that a run passes through and that decide nothing of it: what they look up (names, folders, settings) stands
# resolved in the run's identity or among its entries.
SILENT = (
    "common/catalogue", "common/cli", "common/drawing", "common/experiments", "common/core/errors.py",
    "common/core/index.py", "common/core/options.py", "common/core/registry.py",
)  # fmt: skip

_LIBRARIES = (
    "torch", "torchvision", "timm", "transformers", "numpy", "scipy", "scikit-learn", "rouge-score", "faster-coco-eval",
)  # fmt: skip


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _executed(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The statements that run, at any depth: what stands below `if TYPE_CHECKING` decides nothing."""
    for node in body:
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            for part in ("body", "orelse", "finalbody", "handlers", "cases"):
                inner = getattr(node, part, None)
                if isinstance(inner, list):  # of a lambda or a conditional expression it is an expression
                    yield from _executed(inner)


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Files of this project that a file imports, read from its text; packages count with their __init__."""
    results: set[Path] = set()
    for node in _executed(_parsed(path).body):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("prunelab."):
                base = ROOT.joinpath(*name.split(".")[1:])
                results.update(p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file())
    return frozenset(results)


@cache
def _assigned(path: Path) -> tuple[dict[str, str], frozenset[str]]:
    """Strings that a file gives to names at its top, and those that its classes give to their attribute `name`."""
    top: dict[str, str] = {}
    named: set[str] = set()
    for node in _parsed(path).body:
        for inner in node.body if isinstance(node, ast.ClassDef) else (node,):
            targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
            value = getattr(inner, "value", None)
            if isinstance(targets[0], ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                if inner is node:
                    top[targets[0].id] = value.value
                elif targets[0].id == "name":
                    named.add(value.value)
    return top, frozenset(named)


def names(path: Path) -> frozenset[str]:
    """The names under which the classes of a file are known."""
    return _assigned(path)[1]


def constant(path: Path, name: str) -> str | None:
    """A string constant at the top of a file; None where it has none of that name."""
    return _assigned(path)[0].get(name)


def closure(entries: Iterable[Path], without: Iterable[str] = ()) -> tuple[Path, ...]:
    """The entry files and everything of this project they import, directly or not; files and folders `without` which
    are left out, with what only they import."""
    files = tuple(str(ROOT / name) for name in without)
    folders = tuple(f"{name}/" for name in files)
    seen: set[Path] = set()
    todo = list(entries)
    while todo:
        path = todo.pop()
        if path not in seen and str(path) not in files and not str(path).startswith(folders):
            seen.add(path)
            todo.extend(_imports(path) if path.suffix == ".py" else ())
    return tuple(sorted(seen))


@cache  # thousands of runs share a few dozen sets of entry files
def reached(entries: tuple[str, ...]) -> tuple[str, ...]:
    """The files, from the project's root, whose code decides what comes of entry files."""
    return tuple(str(path.relative_to(ROOT)) for path in closure((ROOT / entry for entry in entries), SILENT))


@cache
def file_hash(path: Path) -> str:
    """sha256 of a file's content, as this process first saw it; of Python its code alone."""
    if path.suffix != ".py":
        return file_digest(path)
    return digest(code(path.read_text(encoding="utf-8"), _parsed(path)))


def code(text: str, tree: ast.Module | None = None) -> str:
    """A module without docstrings, blank lines and lines of comment, which decide nothing. tree: it, parsed."""
    nodes = list(ast.walk(tree or ast.parse(text)))
    docstrings = [
        node.body[0]
        for node in nodes
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    ]
    lines = text.encode().split(b"\n")
    for doc in docstrings:
        first, last = doc.lineno - 1, (doc.end_lineno or doc.lineno) - 1
        behind = lines[last][doc.end_col_offset :]
        lines[first : last + 1] = [lines[first][: doc.col_offset] + behind] + [b""] * (last - first)
    strings = [node for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]
    inside = {i for s in strings for i in range(s.lineno, s.end_lineno or 0)}  # lines that begin in a string
    inside -= {i for doc in docstrings for i in range(doc.lineno, doc.end_lineno or 0)}
    kept = (
        line if i in inside else line.rstrip()
        for i, line in enumerate(lines)
        if i in inside or line.strip()[:1] not in (b"", b"#")
    )
    return b"\n".join(kept).decode()


def sources(entries: Iterable[str]) -> str:
    """One hash of all that entry files, named from the project's root, reach."""
    return _sources(tuple(entries))


@cache
def _sources(entries: tuple[str, ...]) -> str:
    return digest({name: file_hash(ROOT / name) for name in reached(entries)})


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
    try:
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def in_history(commit: str) -> bool | None:
    """Whether a revision is in the history of the one that is checked out; None where no history tells: in a copy
    without git, or a shallow clone."""
    try:
        if _git("rev-parse", "--is-shallow-repository") == "true":
            return None
    except (OSError, subprocess.CalledProcessError):
        return None
    try:
        _git("merge-base", "--is-ancestor", commit, "HEAD")
    except subprocess.CalledProcessError:
        return False
    return True


def repeatable(record: Mapping[str, Any]) -> str:
    """Why nobody can get the code that made a record, in words; '' where history has it, or there is none to ask."""
    made = record["environment"]
    if made.get("commit") is None:
        return "was made from no revision"
    if made.get("dirty"):
        return f"was made from changes to revision {made['commit'][:12]} that no revision has"
    if in_history(made["commit"]) is False:
        return f"was made at revision {made['commit'][:12]}, which is not in the history"
    return ""


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all, with its checksum."""
    content = {"format": FORMAT, **record}
    content["checksum"] = digest(content)
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A record, verified. Raises PrunelabError where it is truncated, altered or not the one its name says."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("checksum")
        intact = digest(record) == checksum and f"{record['identity']}-{record['sources']}" == path.stem
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise PrunelabError(f"the run record {path} is damaged; run its table again, which makes it anew")
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
