"""Data selectors that read a corpus of any size a chunk at a time: for statistics that add up, and for a score a
document. Scores of a file lie in a file, so that memory holds what is chosen and no more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = 1000  # documents
BLOCK = 1 << 16  # documents whose scores are compared at a time
AT_HAND = 1 << 28  # bytes of what was read of a corpus that are kept, so that it is not read twice


class Features(Protocol):
    """What a selector reads of a chunk."""

    @property
    def nbytes(self) -> int: ...


class Scores(Protocol):
    """Scores [n, T] of documents, in memory or not, of which slices are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> Array: ...


F = TypeVar("F", bound=Features)


class StreamSelector(DataSelector, Generic[F]):
    """A selector of documents whose work splits into chunks, so that several processes may share it and an interrupted
    selection can go on. What comes of a chunk depends on the chunk alone."""

    def requires(self) -> frozenset[str]:
        return frozenset({"text"})

    @abstractmethod
    def read(self, texts: Sequence[str]) -> F:
        """What the method sees of a chunk."""

    @abstractmethod
    def count(self, features: F, room: int | None = None) -> Array:
        """Statistics of a chunk [S], which add up; up to the document at which they sum to more than `room`."""

    def room(self) -> int | None:
        """The sum of the raw corpus's statistics at which it has been read enough; None for all of it."""
        return None

    @abstractmethod
    def fit(self, raw: Array, targets: Sequence[Array]) -> Array:
        """What scores are made with, from the statistics [S] of the raw corpus and of each target."""

    @abstractmethod
    def scores(self, features: F, fitted: Array) -> Array:
        """Scores [n, T] of a chunk, larger is better, for each of T targets that choose apart; minus infinity where
        a document may not be chosen."""

    @abstractmethod
    def choose(self, scores: Scores, budget: Budget, rng: np.random.RandomState, targets: Sequence[Array]) -> Array:
        """The documents that stay, ascending, by scores [n, T]; targets: their statistics."""

    def report(self, raw: Array, targets: Sequence[Array], chosen: Array) -> dict[str, float]:
        """What there is to say of a choice, by the statistics of the corpora and of what was chosen."""
        return {}

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        self.check_targets(len(examples.targets))
        targets = [self.total(target.text) for target in examples.targets]
        corpus = _Corpus(self, examples.text)
        fitted = self.fit(total((self.count(part) for part in corpus), self.room(), self.again(corpus)), targets)
        scores = np.concatenate([self.scores(part, fitted) for part in corpus])
        return DataPlan(Gather(torch.from_numpy(self.choose(scores, budget, draws(examples.rng), targets))[None]))

    def check_targets(self, number: int) -> None:
        """Refuse to choose without what to compare with."""
        if not number:
            raise PrunelabError(f"{self.name} compares with a target corpus; give its texts as target (--target FILE)")

    def total(self, texts: Iterable[str]) -> Array:
        """Statistics [S] of a whole corpus."""
        return total((self.count(self.read(chunk)) for chunk in chunks(texts)), None, self.again([]))

    def again(self, corpus: Iterable[F]) -> Callable[[int, int], Array]:
        """What counts the chunk of a number once more, up to a room."""
        return lambda place, room: self.count(next(islice(corpus, place, None)), room)


class _Corpus(Generic[F]):
    """What a selector reads of texts, a chunk at a time and as often as asked."""

    def __init__(self, selector: StreamSelector[F], texts: Iterable[str]) -> None:
        self.selector, self.texts = selector, texts
        self.kept: list[F] = []
        self.whole = False

    def __iter__(self) -> Iterator[F]:
        yield from self.kept
        if self.whole:
            return
        behind = len(self.kept)
        size = sum(part.nbytes for part in self.kept)
        for chunk in islice(chunks(self.texts), behind, None):
            part = self.selector.read(chunk)
            size += part.nbytes
            if size <= AT_HAND and behind == len(self.kept):
                self.kept.append(part)
                behind += 1
            yield part
        self.whole = size <= AT_HAND


def blocks(scores: Scores) -> Iterator[tuple[int, Array]]:
    """Scores a block at a time, with the number of the block's first document."""
    for start in range(0, len(scores), BLOCK):
        yield start, scores[start : start + BLOCK]


class Best:
    """The k documents of largest value among all that were added in their order; of equal ones the earlier."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.values, self.documents = np.empty(0), np.empty(0, np.int64)

    def add(self, values: Array, documents: Array) -> None:
        """Values [m] of documents [m]."""
        self.values = np.concatenate([self.values, values])
        self.documents = np.concatenate([self.documents, documents])
        if len(self.values) > self.k:
            left = np.sort(self._order()[: self.k])
            self.values, self.documents = self.values[left], self.documents[left]

    def first(self) -> list[int]:
        """The documents, the best first."""
        best: list[int] = self.documents[self._order()].tolist()
        return best

    def _order(self) -> Array:
        return np.argsort(-self.values, kind="stable")


def draws(rng: torch.Generator) -> np.random.RandomState:
    """Draws of numpy that a generator of torch decides."""
    return np.random.RandomState(int(torch.randint(2**31, (), generator=rng)))


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of `CHUNK`."""
    stream = iter(texts)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


def total(counted: Iterable[Array], room: int | None, again: Callable[[int, int], Array]) -> Array:
    """The sum of the statistics of chunks in their order, up to the document that fills the room: `again(place, room)`
    counts the chunk in which it stands once more."""
    whole: Array | None = None
    for place, counts in enumerate(counted):
        before = 0 if whole is None else int(whole.sum())
        if room is not None and before + int(counts.sum()) > room:
            counts = again(place, room - before)
            return counts if whole is None else whole + counts
        whole = counts if whole is None else whole + counts
    assert whole is not None
    return whole
