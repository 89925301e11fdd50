"""A selection from files of any size: in chunks, by several processes, with a manifest, and going on after an
interruption with the same outcome."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import digest, unwritable, write_text
from prunelab.common.data_selection.examples import JsonLines, corpus
from prunelab.common.data_selection.reading import SHOWN, short
from prunelab.common.data_selection.streaming import CHUNK, Array, Best, Scores, StreamSelector, blocks, chunks, draws

SAVED = 64  # chunks between two notes of how far the statistics are
WIDTH = 100  # how much a manifest shows of a document
ROOM = "make room there, or name another file with --out"


@dataclass(frozen=True)
class Job:
    """A selection from a file.

    raw, targets: JSON lines (plain or compressed) or Parquet, with the text in `field`. out: gets the lines that stay,
    as they are, and beside it `<out>.manifest.json`. workers: processes; the outcome does not depend on them.
    """

    method: StreamSelector[Any]
    raw: Path
    targets: tuple[Path, ...]
    out: Path
    budget: Budget
    field: str = "text"
    seed: int = 0
    workers: int = 1

    @property
    def work(self) -> Path:
        """Where an unfinished selection stands."""
        return self.out.with_name(f".{self.out.name}.selection")

    @property
    def manifest(self) -> Path:
        return self.out.with_name(f"{self.out.name}.manifest.json")

    def identity(self) -> str:
        """What scores depend on: the method, and the files as they are."""
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files()]
        return digest([repr(self.method), self.field, stats])

    def _files(self) -> tuple[Path, ...]:
        return (self.raw, *self.targets)

    def check(self) -> None:
        """Refuse, before any work, what cannot end well."""
        for path in self._files():
            if not path.is_file():
                raise PrunelabError(f"{path} is no file; check the path")
        if self.out.resolve() in [path.resolve() for path in self._files()]:
            raise PrunelabError(f"{self.out} is read by this selection; name another file to write to")
        if self.workers < 1:
            raise PrunelabError("a selection needs at least one process")
        self.method.check_targets(len(self.targets))
        self.method.budgets(self.budget)


def run(job: Job, progress: bool = True) -> dict[str, Any]:
    """Carry a selection out and return its manifest."""
    job.check()
    raw = corpus(job.raw, job.field)
    try:
        _prepare(job)
        with _pool(job.workers) as each:
            targets = [job.method.total(corpus(path, job.field)) for path in job.targets]
            counts, documents = _counted(job, raw, each, progress)
            scores = _scored(job, raw, job.method.fit(counts, targets), documents, each, progress)
        rng = torch.Generator().manual_seed(job.seed)
        chosen = job.method.choose(scores, job.budget, draws(rng), targets)
        if not len(chosen):
            raise PrunelabError(
                f"{job.method.name} would keep nothing of {documents:,} documents under {job.budget}; keep more"
            )
        manifest = _written(job, raw, scores, chosen, counts, targets, progress)
        write_text(job.manifest, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", ROOM)
        shutil.rmtree(job.work)
    except OSError as error:
        raise unwritable(job.out, error, ROOM) from None
    return manifest


def _prepare(job: Job) -> None:
    """The folder of an earlier start of the same selection, or a new one."""
    note, identity = job.work / "identity", job.identity()
    if not note.exists() or note.read_text() != identity:
        shutil.rmtree(job.work, ignore_errors=True)
        job.work.mkdir(parents=True)
        note.write_text(identity)


Each = Callable[..., Iterator[Any]]


@contextmanager
def _pool(workers: int) -> Iterator[Each]:
    """What maps a function over chunks in their order, a few of them ahead."""
    if workers == 1:
        yield lambda work, parts: map(work, parts)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:

        def ahead(work: Callable[..., Any], parts: Iterable[Any]) -> Iterator[Any]:
            waiting: deque[Any] = deque()
            for part in parts:
                waiting.append(pool.submit(work, part))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield ahead


@dataclass(frozen=True)
class _Count:
    method: StreamSelector[Any]

    def __call__(self, texts: list[str]) -> tuple[Array, int]:
        return self.method.count(self.method.read(texts)), len(texts)


@dataclass(frozen=True)
class _Score:
    method: StreamSelector[Any]
    fitted: Array

    def __call__(self, texts: list[str]) -> Array:
        return self.method.scores(self.method.read(texts), self.fitted)


def _texts(raw: JsonLines, skip: int) -> Iterator[list[str]]:
    """The chunks behind the first `skip`."""
    return chunks(row[raw.field] for row in raw.rows(skip * CHUNK))


def _counted(job: Job, raw: JsonLines, each: Each, progress: bool) -> tuple[Array, int]:
    """Statistics of the raw corpus, and how many documents it has."""
    state = job.work / "counts.npz"
    done, documents, room = 0, 0, job.method.room()
    whole: Array | None = None
    full = False
    if state.exists():
        with np.load(state) as stored:
            whole, full = stored["whole"], bool(stored["full"])
            done, documents = int(stored["done"]), int(stored["documents"])
    for counts, number in track(each(_Count(job.method), _texts(raw, done)), "reading", None, disable=not progress):
        if not full:
            before = 0 if whole is None else int(whole.sum())
            if room is not None and before + int(counts.sum()) > room:
                texts = next(_texts(raw, done))
                counts, full = job.method.count(job.method.read(texts), room - before), True
            whole = counts if whole is None else whole + counts
        done, documents = done + 1, documents + number
        if not done % SAVED:
            _note(state, whole=whole, done=done, documents=documents, full=full)
    if whole is None:
        raise PrunelabError(f"{job.raw} holds no document; give at least one")
    _note(state, whole=whole, done=done, documents=documents, full=full)
    return whole, documents


def _note(path: Path, **arrays: Any) -> None:
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)


def _scored(job: Job, raw: JsonLines, fitted: Array, documents: int, each: Each, progress: bool) -> Scores:
    """Scores [n, T] of all documents, in a file; whole chunks that an earlier start left are taken as they are."""
    path, columns = job.work / "scores", len(fitted)
    size = 8 * columns * CHUNK
    done = path.stat().st_size // size if path.exists() else 0
    with path.open("ab") as file:
        file.truncate(done * size)
        parts = each(_Score(job.method, fitted), _texts(raw, done))
        left = max(0, -(-documents // CHUNK) - done)
        for scores in track(parts, "scoring", left, disable=not progress):
            file.write(np.ascontiguousarray(scores, np.float64).tobytes())
            file.flush()
    result = _Stored(path, columns)
    if len(result) != documents:
        raise PrunelabError(f"{job.raw} changed while it was read; select again when nothing writes to it")
    return result


@dataclass(frozen=True)
class _Stored:
    """Scores [n, T] in a file."""

    path: Path
    columns: int

    def __len__(self) -> int:
        return self.path.stat().st_size // (8 * self.columns)

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(len(self))
        count, offset = self.columns * (stop - start), 8 * self.columns * start
        return np.fromfile(self.path, np.float64, count, offset=offset).reshape(-1, self.columns)


@dataclass(frozen=True)
class _Examples:
    """Documents to show of each kind, by number, with their scores, and how many were sorted out."""

    kinds: dict[str, list[int]]
    scores: dict[int, float]
    sorted_out: int


def _examples(scores: Scores, chosen: Array) -> _Examples:
    names = "kept, best first", "kept, the last", "dropped, the first", "dropped, the last"
    best, sorted_out = {name: Best(SHOWN) for name in names}, 0
    for start, block in blocks(scores):
        values, stays = block.max(1), np.zeros(len(block), bool)
        sorted_out += int((~np.isfinite(block).any(1)).sum())
        first, last = np.searchsorted(chosen, (start, start + len(block)))
        stays[chosen[first:last] - start] = True
        for side, mask in (("kept", stays), ("dropped", ~stays)):
            documents = np.flatnonzero(mask)
            high, low = (name for name in names if name.startswith(side))
            best[high].add(values[documents], start + documents)
            best[low].add(-values[documents], start + documents)
    ends = {name: -1 if name.endswith("last") else 1 for name in names}
    kinds = {name: one.first()[:: ends[name]] for name, one in best.items()}
    shown = {
        document: ends[name] * value
        for name, one in best.items()
        for document, value in zip(one.documents.tolist(), one.values.tolist(), strict=True)
    }
    return _Examples(kinds, shown, sorted_out)


def _written(
    job: Job, raw: JsonLines, scores: Scores, chosen: Array, counts: Array, targets: list[Array], progress: bool
) -> dict[str, Any]:
    """The lines that stay go to the output; what came of it, in words and numbers."""
    examples = _examples(scores, chosen)
    shown = dict.fromkeys(examples.scores, "")
    before, after, statistics = hashlib.sha256(), hashlib.sha256(), np.zeros_like(counts)
    part = job.out.with_name(f".{job.out.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        held: list[str] = []
        waiting = iter(chosen.tolist())
        following = next(waiting, None)
        for place, line in enumerate(track(raw.lines(), "writing", len(scores), disable=not progress)):
            before.update(line)
            stays = place == following
            if stays or place in shown:
                text = raw.row(line, place + 1)[raw.field]
                if place in shown:
                    shown[place] = text
                if stays:
                    following = next(waiting, None)
                    line = line.rstrip(b"\r\n") + b"\n"
                    after.update(line)
                    file.write(line)
                    held.append(text)
                    if len(held) == CHUNK:
                        statistics, held = statistics + job.method.count(job.method.read(held)), []
        if held:
            statistics = statistics + job.method.count(job.method.read(held))
    part.replace(job.out)
    samples = {
        kind: [
            {"line": place + 1, "score": _number(examples.scores[place]), "text": short(shown[place], WIDTH)}
            for place in documents
        ]
        for kind, documents in examples.kinds.items()
    }
    return {
        "method": repr(job.method), "budget": str(job.budget), "seed": job.seed, "field": job.field,
        "raw": {"file": job.raw.name, "documents": len(scores), "sha256": before.hexdigest()},
        "targets": [path.name for path in job.targets],
        "out": {"file": job.out.name, "documents": len(chosen), "sha256": after.hexdigest()},
        "sorted out": examples.sorted_out,
        "statistics": {name: _number(value) for name, value in job.method.report(counts, targets, statistics).items()},
        "samples": samples,
    }  # fmt: skip


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def summary(manifest: Mapping[str, Any]) -> list[str]:
    """A manifest in lines to read."""
    kept, documents = manifest["out"]["documents"], manifest["raw"]["documents"]
    lines = [f"kept {kept:,} of {documents:,} documents"]
    if kept == documents:
        lines.append(f"all of them: {manifest['budget']} asks for no fewer than there are")
    if manifest["sorted out"]:
        lines.append(f"sorted out before: {manifest['sorted out']:,}")
    lines += [f"{name}: {value}" for name, value in manifest["statistics"].items()]
    for kind, samples in manifest["samples"].items():
        lines += [f"{kind}:", *(f"  {sample['score']!s:>12}  {sample['text']}" for sample in islice(samples, SHOWN))]
    return lines
