"""`python -m prunelab prefetch`: what chosen tables read at a scale, locked, downloaded and checked, before any run.

A download is told before it starts: how much, under which licences, and what a reader must do. Every file is compared
with the checksum that the hub states for it; only when all of a repository's are right a receipt beside them says so,
and runs take nothing without one. Revisions and checksums are locked in configs/revisions.lock.yaml.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from prunelab.common.catalogue import hub, lookup
from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import file_digest, inside
from prunelab.common.experiments import plans
from prunelab.common.experiments.derived import Derived, behind
from prunelab.common.experiments.run import Run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT = 30.0  # seconds that the hub has for an answer
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Item:
    """An entry of the catalogues at paper scale, and the tables that read it."""

    kind: hub.Kind
    name: str
    entry: Mapping[str, Any]
    tables: tuple[str, ...]

    @property
    def locked(self) -> hub.Locked | None:
        """What the lock says of it; None where it says nothing, or not of the files that this entry needs."""
        result = hub.lock().of(self.kind).get(self.entry.get("hub", ""))
        if result is None or self.entry.get("revision", result.revision) != result.revision:
            return None
        return result if result.whole or self.entry.get("file") in result.files else None

    @property
    def files(self) -> dict[str, hub.File]:
        """The files that are needed, with what the hub states of them; none where they are not locked."""
        result = self.locked.files if self.locked else {}
        if "file" in self.entry:
            return {name: file for name, file in result.items() if name == self.entry["file"]}
        return {name: file for name, file in result.items() if hub.wanted(name, self.kind, self.pickled(result))}

    def pickled(self, names: Iterable[str]) -> bool:
        """Whether pickled tensors are taken of files of these names: the entry says so, and there are no others."""
        return bool(self.entry.get("pickled")) and not any(name.endswith(".safetensors") for name in names)

    @property
    def gigabytes(self) -> float | None:
        """Size of the download in GB: the hub's figure where it is locked, else the catalogue's rough one."""
        return sum(file.size for file in self.files.values()) / 1e9 if self.files else self.entry.get("gb")

    def state(self, config: Mapping[str, Any]) -> str:
        """Whether it is here, and else how it comes here."""
        if not lookup.resolve(self.kind, self.name, "paper", config).missing:
            return "here" if "hub" not in self.entry or hub.checked(self.entry, self.kind, config) else "stood in for"
        if "hub" not in self.entry:
            return "by hand"
        return "to download" if self.locked else "unlocked"


def items(config: Mapping[str, Any]) -> list[Item]:
    """The entries that the tables of the chosen papers read at paper scale, in the order of the tables."""
    results: dict[tuple[hub.Kind, str], list[str]] = {}
    for slug, table, run in _paper_runs(config):
        for kind, name in run.names:
            results.setdefault((kind, name), []).append(f"{slug}: {table}")
    entries = {"model": lookup.model, "dataset": lookup.dataset}
    return [
        Item(kind, name, entries[kind](name)["paper"], tuple(dict.fromkeys(tables)))
        for (kind, name), tables in results.items()
        if "paper" in entries[kind](name)
    ]


def _paper_runs(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Run]]:
    """Every run at paper scale of the chosen papers, with the paper and table that show it."""
    config = {**config, "scale": "paper", "assets": ""}
    plan = plans.of(config)
    for slug in plan.slugs:
        shown: list[tuple[str, Run | Derived | str | None]] = [
            *((cell.reported.table, cell.runs.get("paper")) for cell in plan.cells(slug)),
            *((point.board.name, point.run) for point in plan.points(slug)),
            *((figure.figure.name, figure.run) for figure in plan.figures(slug)),
        ]
        for table, entry in shown:
            for run in behind(entry):
                yield slug, table, run


def run(
    config: Mapping[str, Any], console: Console, *, lock: bool = False, yes: bool = False, dry: bool = False
) -> None:
    """Lock (where asked), tell, ask, download, check. Raises PrunelabError with all that could not be had."""
    wanted = items(config)
    if lock and not dry:
        resolve([item for item in wanted if "hub" in item.entry and item.locked is None])
    if not dry:
        recognise(wanted, config)
    todo = tell(wanted, config, console)
    if dry or not todo:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise PrunelabError(
                "nobody is here to be asked; say --yes to start the download, or --dry-run to look only"
            )
        if console.input("start? [y/N] ").strip().lower() not in ("y", "yes"):
            return
    left = fetch(todo, config, console)
    if left:
        raise PrunelabError("not downloaded: " + "; ".join(left))


def recognise(wanted: Sequence[Item], config: Mapping[str, Any]) -> None:
    """Look through folders of the user's that stand in for locked repositories: one whose files all have the published
    checksums is the published repository, and is received as such."""
    for item in wanted:
        folder = hub.stand_in(item.entry["hub"], item.kind, config) if "hub" in item.entry else None
        if folder is None or item.locked is None or hub.checked(item.entry, item.kind, config):
            continue
        if all((path := inside(folder, name)).is_file() and matches(path, file) for name, file in item.files.items()):
            plain = folder.parent.name != "snapshots"
            hub.receive(item.entry, folder if plain else folder.parents[1], item.locked.revision)


def tell(wanted: Sequence[Item], config: Mapping[str, Any], console: Console) -> list[Item]:
    """Show what is read and what that takes; the items that can be downloaded now, one for each set of files."""
    table = Table("entry", "from", "GB", "licence", "state", "read by")
    todo: dict[tuple[str, str, str], Item] = {}
    notes: dict[str, None] = {}
    for item in wanted:
        state, entry = item.state(config), item.entry
        size = "?" if item.gigabytes is None else f"{'' if item.files else '~'}{item.gigabytes:.3g}"
        gated = entry.get("gated") or (item.locked is not None and item.locked.gated)
        place = entry.get("hub") or (f"--config {entry['setting']}=DIR" if "setting" in entry else "checkpoints")
        shown = f"{state}, gated" if gated and state in ("to download", "unlocked") else state
        table.add_row(item.name, place, size, entry.get("licence", ""), shown, "; ".join(item.tables))
        if state == "to download":
            todo.setdefault((item.kind, entry["hub"], entry.get("file", "")), item)
        if state in ("here", "stood in for"):
            continue
        if "needs" in entry and not gated:
            notes[f"{item.name} needs {entry['needs'].rstrip(',')}"] = None
        elif state == "by hand":
            notes[f"{item.name} needs {_by_hand(entry)}"] = None
        if gated:
            notes[f"{entry['hub']} is gated: {_ungate(entry['hub'])}"] = None
    console.print(table)
    for note in notes:
        console.print(f"- {note}", markup=False)
    total = sum(item.gigabytes or 0 for item in todo.values())
    licences = ", ".join(sorted({item.entry["licence"] for item in todo.values()})) or "none"
    console.print(
        f"to download: {len(todo)} repositories, {total:.3g} GB, into {hub.cache_folder(config)}; licences: {licences}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    unlocked = [item for item in wanted if item.state(config) == "unlocked"]
    if unlocked:
        rough = sum({item.entry["hub"]: item.entry.get("gb", 0) for item in unlocked}.values())
        console.print(
            f"unlocked: {len(unlocked)} entries, about {rough:.3g} GB; --lock asks the hub for their revisions"
        )
    return list(todo.values())


def _by_hand(entry: Mapping[str, Any]) -> str:
    return f"{entry['file']} from {entry['source']} in the checkpoints folder (--config checkpoints=DIR)"


def _ungate(name: str) -> str:
    return f"accept its terms at {_endpoint()}/{name}, then run `hf auth login` or set HF_TOKEN"


# -- the hub ---------------------------------------------------------------------------------------------------------


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _api() -> HfApi:
    from huggingface_hub import HfApi

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise PrunelabError("HF_HUB_OFFLINE is set, so nothing can be asked of the hub; unset it to lock or download")
    return HfApi(endpoint=_endpoint(), library_name="prunelab")


def _complaint(error: Exception, name: str) -> PrunelabError:
    """What went wrong between us and the hub, in one line that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError):  # neither on the hub, nor in the cache: the first is the reason
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error

    if isinstance(error, GatedRepoError):
        return PrunelabError(f"{name} is gated: {_ungate(name)}")
    if isinstance(error, RepositoryNotFoundError):
        return PrunelabError(f"the hub shows no {name}; if it is private or gated, {_ungate(name)}")
    if isinstance(error, RemoteEntryNotFoundError):
        return PrunelabError(f"the hub has no such file of {name} ({_first_line(error)}); correct the catalogue")
    if isinstance(error, HfHubHTTPError):
        return PrunelabError(f"the hub refuses {name} ({_first_line(error)}); try again later")
    return PrunelabError(
        f"the hub {_endpoint()} does not answer ({type(error).__name__}: {_first_line(error)}); try again later,"
        " files that are complete are kept"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def resolve(wanted: Sequence[Item]) -> None:
    """Ask the hub for the commit, files, sizes and checksums of entries, and lock them. A commit once locked stays."""
    if not wanted:
        return
    api = _api()
    locked: dict[hub.Kind, dict[str, hub.Locked]] = {
        "model": dict(hub.lock().models), "dataset": dict(hub.lock().datasets)
    }  # fmt: skip
    for item in wanted:
        name, known = item.entry["hub"], locked[item.kind].get(item.entry["hub"])
        commit = item.entry.get("revision") or (known.revision if known else None)
        try:
            locked[item.kind][name] = _ask(api, item, commit, known)
        except (OSError, ValueError) as error:  # what the hub client and the network raise
            raise _complaint(error, name) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] not in ("huggingface_hub", "httpx", "httpx2", "httpcore2"):
                raise  # a defect of ours
            raise _complaint(error, name) from None
    hub.write_lock(hub.Lock(models=locked["model"], datasets=locked["dataset"]))


def _ask(api: HfApi, item: Item, commit: str | None, known: hub.Locked | None) -> hub.Locked:
    """A repository as the hub has it, at a commit (None: the newest), beside what is known of it at that commit."""
    name, file = item.entry["hub"], item.entry.get("file")
    info: Any = api.repo_info(
        name, repo_type=item.kind, revision=commit, timeout=TIMEOUT, files_metadata=file is None
    )  # fmt: skip
    if file is None:
        stated = [(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None, s.blob_id) for s in info.siblings or ()]
    else:
        results: list[Any] = api.get_paths_info(name, [file], repo_type=item.kind, revision=info.sha)
        stated = [(f.path, f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in results if hasattr(f, "size")]
    pickled = item.pickled(path for path, *_ in stated)
    files = {
        path: hub.File(size=size, sha256=sha256) if sha256 else hub.File(size=size, git=blob)
        for path, size, sha256, blob in stated
        if size is not None and (path == file if file else hub.wanted(path, item.kind, pickled))
    }
    weights = (".safetensors", ".bin") if pickled else ".safetensors"
    if item.kind == "model" and file is None and not any(path.endswith(weights) for path in files):
        raise PrunelabError(
            f"{name} holds no safetensors, and pickled weights are not read; convert it, and put the result in"
            f" DIR/{name} of --config hub=DIR"
        )
    if not files:
        raise PrunelabError(f"{name} holds {'no ' + file if file else 'no weights or texts'}; correct the catalogue")
    kept = known.files if known and known.revision == info.sha else {}
    return hub.Locked(
        revision=str(info.sha),
        licence=str(getattr(info.card_data, "license", None) or ""),
        gated=bool(info.gated),
        whole=file is None or bool(kept and known and known.whole),
        files={**kept, **files},
    )


def fetch(todo: Sequence[Item], config: Mapping[str, Any], console: Console) -> list[str]:
    """Download and check; why some could not be had, in words. What is complete is kept for the next time."""
    root = hub.cache_folder(config)
    root.mkdir(parents=True, exist_ok=True)
    total = sum(item.gigabytes or 0 for item in todo)
    free = shutil.disk_usage(root).free / 1e9
    if free < total:
        raise PrunelabError(f"{root} has {free:.3g} GB left and the download may take {total:.3g} GB; make room")
    api, left = _api(), []
    for item in todo:
        try:
            _fetch_one(api, item, root, console)
        except PrunelabError as error:
            left.append(str(error))
    return left


def _fetch_one(api: HfApi, item: Item, root: Path, console: Console) -> None:
    name, locked = item.entry["hub"], item.locked
    assert locked is not None
    storage = hub.storage(root, name, item.kind)
    known = hub.receipts(storage)
    begun = known | {locked.revision: known.get(locked.revision, [])}
    files.write_text(storage / hub.RECEIPT, json.dumps(begun))
    for number, (path, file) in enumerate(item.files.items(), 1):
        console.print(
            f"{name} {number}/{len(item.files)} {path} {file.size / 1e9:.3g} GB", markup=False, soft_wrap=True
        )
        pointer = inside(storage / "snapshots" / locked.revision, path)
        if pointer.exists() and not matches(pointer, file):
            _drop(pointer)  # damaged since, or never checked
        try:
            api.hf_hub_download(name, path, repo_type=item.kind, revision=locked.revision, cache_dir=root)
        except PrunelabError:
            raise
        except Exception as error:  # the hub client's, the network's or the disk's; nothing of a half file is left
            raise _complaint(error, name) from None
        if not matches(pointer, file):
            _drop(pointer)
            raise PrunelabError(f"{path} of {name} came with a wrong checksum and was thrown away; try again")
    hub.receive(item.entry, storage, locked.revision)


def matches(path: Path, file: hub.File) -> bool:
    """Whether a file has the size and the checksum that the hub states of it."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256:
        return file_digest(path) == file.sha256
    return _hash(path, hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)) == file.git


def _hash(path: Path, state: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return str(state.hexdigest())


def _drop(pointer: Path) -> None:
    """Remove a file of a snapshot with the blob that it points to."""
    pointer.resolve().unlink(missing_ok=True)
    pointer.unlink(missing_ok=True)
