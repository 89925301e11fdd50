"""The results folder as a workflow finds it and leaves it: one workflow at a time, whole files, and an order of making
that does not depend on clocks. Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT, digest, unwritable, write_text
from prunelab.common.experiments import provenance

LOCK = "lock"
REHEARSALS = "rehearsals.json"  # outcomes of `python -m prunelab rehearse`
_LEFT = re.compile(r"\..+\.(?P<process>\d+)")  # what `write_text` writes before it is put in place


def hold(results: Path) -> IO[str]:
    """Hold a results folder until the returned file is closed or the process ends, however it ends: the kernel keeps
    the lock, so that a killed workflow leaves nothing to unlock. What dead processes left half-written goes.

    Raises PrunelabError where another workflow holds the folder, or where it cannot be written.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        file = (results / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(results, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise PrunelabError(
            f"{holder} is making the tables in {results}; wait until it is done, or give another folder with"
            " --config results=DIR"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    sweep(results)
    return file


def sweep(results: Path) -> list[Path]:
    """Remove files that killed processes left half-written; those of living ones stay."""
    left = []
    for path in results.rglob(".*"):
        result = _LEFT.fullmatch(path.name)
        if result and path.is_file() and not _alive(int(result["process"])):
            path.unlink(missing_ok=True)
            left.append(path)
    return left


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def check_writable(results: Path, wanted: Iterable[Path]) -> None:
    """Raise PrunelabError where something wanted is still to be made and the folder cannot be written."""
    if results.exists() and not os.access(results, os.W_OK) and not all(path.exists() for path in wanted):
        raise PrunelabError(f"cannot write to {results}, which is read-only; give another with --config results=DIR")


def set_aside_damaged(results: Path) -> list[Path]:
    """Put damaged records out of the way, also those that no run asks for, as tables may show them; which they were."""
    try:
        return [path for path in sorted((results / "records").glob("*.json")) if provenance.reject_damaged(path)]
    except OSError as error:
        raise unwritable(results, error) from None


def settle(made: Iterable[Path], made_from: Iterable[Path], now: float | None = None) -> None:
    """Bring times that lie in the future to the present, as after a clock that was ahead: what was made becomes older
    than what it was made from, so that it is made again rather than taken for fresh.

    now: seconds since the epoch, for tests.
    """
    now = time.time() if now is None else now
    for paths, moment in ((made_from, now), (made, now - 1)):
        for path in paths:
            try:
                if path.stat().st_mtime > now:
                    os.utime(path, (moment, moment))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise unwritable(path, error) from None


def note_inputs(note: Path, settings: Mapping[str, Any], records: Iterable[Path], files: Iterable[Path]) -> None:
    """Write down what the tables are made from besides the content of records: the file changes exactly if that does,
    whatever the clock says.

    records: those asked for; others beside them may be shown, too, and count by name.
    """
    wanted = {path.stem for path in records}
    beside = {path.stem for path in (note.parent / "records").glob("*.json")} - wanted
    content = {
        "settings": {key: value for key, value in sorted(settings.items()) if key not in ("results", "batch")},
        "records": digest(sorted(wanted)),
        "other records": digest(sorted(beside)),
        "files": {str(p.relative_to(ROOT)): provenance.file_hash(p)[:12] for p in sorted(set(files))},
    }
    text = json.dumps(content, indent=1) + "\n"
    try:
        same = note.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        same = False
    if not same:
        write_text(note, text)
