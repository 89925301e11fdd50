"""Files that others made, read with care: names stay inside their folder, archives unpack to no more than expected.

Imports no torch.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from prunelab.common.core.errors import PrunelabError

# One member of an archive is a text; the largest that is read here, C4's pages of one shard, unpack to 0.8 GB.
MEMBER_LIMIT = 64 << 20  # bytes
STREAM_LIMIT = 4 << 30  # bytes


def name_fault(name: str) -> str | None:
    """What keeps a name from being a path below some folder, in words; None where it is one."""
    if not name or name != name.strip() or any(ord(letter) < 32 for letter in name):
        return "is empty, or holds spaces at its ends or control characters"
    if name.startswith(("/", "~")) or "\\" in name or ":" in name:
        return "is an absolute path or an address"
    if ".." in PurePosixPath(name).parts:
        return "leads out of its folder"
    return None


def inside(folder: Path | str, name: str) -> Path:
    """`folder/name`, for a name that came from a catalogue or a data set. Raises PrunelabError where it would lead
    elsewhere. Links that a user laid in a folder of their own are followed."""
    fault = name_fault(name)
    if fault is not None:
        raise PrunelabError(f"the name {name!r} {fault}; only names of files inside {folder} are read")
    return Path(folder) / name


def archive(path: Path | str) -> zipfile.ZipFile | tarfile.TarFile:
    """A zip, or a tar however compressed, open to read. Raises PrunelabError where it is neither."""
    try:
        return zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path)
    except FileNotFoundError:
        raise PrunelabError(f"the archive {path} does not exist; fetch it first") from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise PrunelabError(f"the archive {path} cannot be read ({error}); fetch it again") from None


def names(archive: zipfile.ZipFile | tarfile.TarFile) -> list[str]:
    """The files that an archive holds, folders and links left out."""
    if isinstance(archive, zipfile.ZipFile):
        return [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    try:
        return [entry.name for entry in archive if entry.isfile()]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise PrunelabError(f"the archive {archive.name!r} cannot be read ({error}); fetch it again") from None


def member(archive: zipfile.ZipFile | tarfile.TarFile, name: str, limit: int = MEMBER_LIMIT) -> bytes:
    """One file of an archive, read in memory: nothing is unpacked to a disk, so that its name can lead nowhere.

    Raises PrunelabError where it is absent, damaged, or larger than `limit` bytes, whatever the archive says of it.
    """
    try:
        file = archive.open(name) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(name)
        if file is None:
            raise KeyError(name)
        with file:
            content = file.read(limit + 1)
    except KeyError:
        raise PrunelabError(f"the archive has no file {name!r}; fetch it again") from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, RuntimeError) as error:
        raise PrunelabError(f"{name!r} of the archive cannot be read ({error}); fetch it again") from None
    if len(content) > limit:
        raise PrunelabError(f"{name!r} of the archive unpacks to more than {limit / 1e6:.0f} MB; fetch it again")
    return content


def lines(path: Path | str, limit: int = STREAM_LIMIT) -> Iterator[str]:
    """Lines of a gzipped text in UTF-8, none longer than a member, all together no more than `limit` bytes."""
    total = 0
    try:
        with gzip.open(path) as stream:
            while line := stream.readline(MEMBER_LIMIT + 1):
                total += len(line)
                if len(line) > MEMBER_LIMIT or total > limit:
                    raise PrunelabError(f"{path} unpacks to more than expected; fetch it again")
                yield line.decode("utf8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise PrunelabError(f"{path} cannot be read ({error}); fetch it again") from None


ROOT = Path(__file__).resolve().parents[2]


def read_yaml(text: str) -> Any:
    """What a YAML text says, by libyaml where PyYAML was built with it, which is ten times as fast. Raises
    yaml.YAMLError as `safe_load` does, and where a mapping has a key twice, of which that would keep the last."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _no_key_twice(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _no_key_twice(top: yaml.Node) -> None:
    """Aliases share their node, so that each is looked at once."""
    seen, left = set[int](), [top]
    while left:
        node = left.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
            continue
        keys = set[tuple[str, str]]()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"line {key.start_mark.line + 1} gives the key '{key.value}' a second time",
                        key.start_mark,
                    )
                keys.add((key.tag, key.value))
            left.append(value)


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_text(path: Path, text: str, remedy: str = "make room there, or give --config results=DIR") -> None:
    """Write a text file whole or not at all. Raises PrunelabError, with a remedy, where that cannot be."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error, remedy) from None


def unwritable(
    path: Path, error: OSError, remedy: str = "make room there, or give --config results=DIR"
) -> PrunelabError:
    """What to do about a file or folder that cannot be written, in one line."""
    return PrunelabError(f"cannot write {path} ({error.strerror}); {remedy}")
