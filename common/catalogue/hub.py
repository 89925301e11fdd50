"""Repositories of the hub on this machine: which revision counts, where its files lie, whether they are whole.

Runs read files from here alone and never talk to the hub; `python -m prunelab prefetch` does, which downloads what
chosen tables need, checks it, and notes it in a receipt beside the files. A folder of the user's (`--config hub=DIR`)
stands before the hub's own cache: in the hub's layout, or plain, as DIR/<organisation>/<name>. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from huggingface_hub import constants
from pydantic import Field, ValidationError

from prunelab.common.catalogue.schema import Hub, Name, Revision, Strict
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import inside

Kind = Literal["model", "dataset"]

LOCK = files.ROOT / "configs" / "revisions.lock.yaml"
RECEIPT = "prunelab.json"
WHOLE = "*"  # in a receipt: all files that are needed of a repository, and not single ones
# What is taken of a repository that no entry names a file of, in lower case: weights, texts and data, never code, and
# pickles only where an entry says that there are no others (`PICKLED`). The readme of a data set names its parts.
WANTED: Mapping[str, tuple[str, ...]] = {
    "model": ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"),
    "dataset": ("readme.md", "*.parquet", "*.arrow", "*.json", "*.jsonl", "*.csv", "*.tsv", "*.txt", "*.gz", "*.zst",
                "*.zip", "*.tar", "*.mp4"),
}  # fmt: skip
PICKLED = "*.bin"
_SAMPLE = 1 << 20  # bytes at both ends of a large file that its fingerprint reads


class File(Strict):
    """A file as the hub has it: its size, and the sha256 of large files or git's hash of small ones."""

    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    git: Annotated[str | None, Field(pattern=r"^[0-9a-f]{40}$")] = None


class Locked(Strict):
    """A repository at one commit."""

    revision: Revision
    licence: str = ""
    gated: bool = False
    whole: bool = False  # whether `files` are all that is taken of it, and not single ones that entries name
    files: dict[Name, File] = Field(default_factory=dict)


class Lock(Strict):
    """configs/revisions.lock.yaml."""

    models: dict[Hub, Locked] = Field(default_factory=dict)
    datasets: dict[Hub, Locked] = Field(default_factory=dict)

    def of(self, kind: Kind) -> dict[str, Locked]:
        return self.models if kind == "model" else self.datasets


def lock() -> Lock:
    """What is locked; nothing where there is no lock file."""
    return _lock(LOCK, LOCK.stat().st_mtime_ns if LOCK.exists() else 0)


@cache
def _lock(path: Path, changed: int) -> Lock:
    if not changed:
        return Lock()
    try:
        return Lock.model_validate(yaml.safe_load(path.read_text(encoding="utf8")) or {})
    except (ValidationError, yaml.YAMLError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise PrunelabError(f"{path.name} is damaged ({first}); restore it, or move it away and lock anew") from None


def write_lock(content: Lock) -> None:
    """Write the lock file, whole, in the order of names."""
    plain = content.model_dump(exclude_defaults=True)
    text = yaml.safe_dump(plain, sort_keys=True, width=120) if plain else "{}\n"
    head = "# Revisions and checksums, as the hub had them when `python -m prunelab prefetch --lock` asked.\n"
    files.write_text(LOCK, head + text)


def revision(entry: Mapping[str, Any], kind: Kind) -> str | None:
    """The commit that an entry's repository counts at: the one it pins, else the locked one."""
    locked = lock().of(kind).get(entry["hub"])
    return entry.get("revision") or (locked.revision if locked else None)


# -- places ----------------------------------------------------------------------------------------------------------


def cache_folder(config: Mapping[str, Any]) -> Path:
    """Where downloads go: the user's folder, else the hub client's own cache."""
    return Path(config.get("hub") or constants.HF_HUB_CACHE)


def storage(root: Path, name: str, kind: Kind) -> Path:
    """A repository's folder in the hub's layout: in it `snapshots/<commit>/` holds its files."""
    from huggingface_hub.file_download import repo_folder_name  # takes a while, and a stored plan needs it not

    return root / repo_folder_name(repo_id=name, repo_type=kind)


def receipts(folder: Path) -> dict[str, list[str]]:
    """What was downloaded and checked of a repository, by revision: names of files, or `WHOLE`."""
    try:
        content = json.loads((folder / RECEIPT).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def stand_in(name: str, kind: Kind, config: Mapping[str, Any]) -> Path | None:
    """A folder of the user's that stands in for a repository; its content is taken as it is."""
    if not config.get("hub"):
        return None
    plain = Path(config["hub"]) / name
    if plain.is_dir():
        return plain
    repository = storage(Path(config["hub"]), name, kind)
    ours = receipts(repository)  # maybe half of a download
    snapshots = sorted(path for path in repository.glob("snapshots/*") if path.name not in ours)
    main = repository / "refs" / "main"
    if main.is_file():
        snapshots = [path for path in snapshots if path.name == main.read_text().strip()]
    return snapshots[0] if len(snapshots) == 1 else None


def checked(entry: Mapping[str, Any], kind: Kind, config: Mapping[str, Any]) -> Path | None:
    """The folder of an entry's repository at its revision, where a receipt says that it is whole."""
    commit = revision(entry, kind)
    for root in dict.fromkeys((cache_folder(config), Path(constants.HF_HUB_CACHE))):
        folder = storage(root, entry["hub"], kind)
        snapshot = folder / "snapshots" / (commit or "none")
        if snapshot.is_dir() and _received(entry, folder, snapshot.name):
            return snapshot
    plain = Path(config["hub"]) / entry["hub"] if config.get("hub") else None
    return plain if plain and commit and _received(entry, plain, commit) else None


def _received(entry: Mapping[str, Any], folder: Path, commit: str) -> bool:
    return bool({entry.get("file", WHOLE), WHOLE} & set(receipts(folder).get(commit, ())))


def receive(entry: Mapping[str, Any], folder: Path, commit: str) -> None:
    """Note that what an entry needs of a repository lies whole in its folder, at that commit."""
    known = receipts(folder)
    checked = {*known.get(commit, []), entry.get("file", WHOLE)}
    files.write_text(folder / RECEIPT, json.dumps(known | {commit: sorted(checked)}))


def missing(entry: Mapping[str, Any], kind: Kind, config: Mapping[str, Any]) -> str:
    """What it takes to have an entry's repository here, in words; '' where it is here."""
    if checked(entry, kind, config) or stand_in(entry["hub"], kind, config):
        return ""
    if revision(entry, kind) is None:
        return f"a pinned revision of {entry['hub']} (python -m prunelab prefetch --lock)"
    return f"a download of {entry['hub']} (python -m prunelab prefetch)"


def identity(entry: Mapping[str, Any], kind: Kind, config: Mapping[str, Any]) -> dict[str, str]:
    """What names the content of an entry's repository: its revision, or the fingerprint of what stands in for it."""
    if checked(entry, kind, config) is None and (local := stand_in(entry["hub"], kind, config)) is not None:
        return {"local": fingerprint(local, kind, bool(entry.get("pickled")))}
    commit = revision(entry, kind)
    return {"revision": commit} if commit else {}


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """The files below a folder with size and time of change, which tell whether it was touched."""
    result = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return [(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in result]


def surroundings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is here of the hub: each repository's receipt and revisions in the hub client's cache, and every file of the
    user's folder, whose content stands in for what was published."""
    root = Path(constants.HF_HUB_CACHE)
    kept = {
        folder.name: [receipts(folder), sorted(path.name for path in folder.glob("snapshots/*"))]
        for folder in sorted(root.glob("*s--*--*"))
    }
    return {"cache": [str(root), kept], "own": listing(Path(config["hub"])) if config.get("hub") else []}


@cache
def fingerprint(folder: Path, kind: Kind, pickled: bool = False) -> str:
    """A hash of a folder's files: names, sizes, and their first and last MB, as a whole checkpoint takes minutes."""
    results = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and wanted(p.name, kind, pickled)):
        size = path.stat().st_size
        with path.open("rb") as file:
            read = hashlib.sha256(file.read(_SAMPLE))
            file.seek(max(size - _SAMPLE, 0))
            read.update(file.read(_SAMPLE))
        results[path.relative_to(folder).as_posix()] = (size, read.hexdigest())
    return files.digest(results)[:20]


def wanted(name: str, kind: Kind, pickled: bool = False) -> bool:
    """Whether a file of a repository is of those that are taken, with pickled tensors or without."""
    return any(fnmatch(name.lower(), pattern) for pattern in (*WANTED[kind], *([PICKLED] if pickled else [])))


def folder(identity: Mapping[str, Any], kind: Kind, config: Mapping[str, Any]) -> Path:
    """The folder with the files of a repository that a run's identity names."""
    name = str(identity["hub"])
    if "local" in identity:
        result = stand_in(name, kind, config)
    elif "revision" in identity:
        result = checked(identity, kind, config)
    else:
        raise PrunelabError(f"pin a revision of {name} first (python -m prunelab prefetch --lock)")
    if result is None:
        raise PrunelabError(f"{name} cannot be had here; download it first (python -m prunelab prefetch)")
    return result


def file(identity: Mapping[str, Any], kind: Kind, config: Mapping[str, Any]) -> Path:
    """The one file of a repository that a run's identity names."""
    path = inside(folder(identity, kind, config), str(identity["file"]))
    if not path.is_file():
        raise PrunelabError(f"{identity['file']} of {identity['hub']} cannot be had here; download it first")
    return path
