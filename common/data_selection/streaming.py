"""Data selectors that read a corpus of any size twice, a chunk at a time: once for statistics that add up, once for a
score a document. What is kept in memory is the scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather
from prunelab.common.data_selection.examples import Examples
from prunelab.common.data_selection.role import DataPlan, DataSelector

Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = 1000  # documents


class StreamSelector(DataSelector):
    """A selector of documents whose work splits into chunks, so that several processes may share it and an interrupted
    selection can go on.

    reads_target: whether it compares with target corpora. Everything of a chunk depends on the chunk alone.
    """

    reads_target = True

    def requires(self) -> frozenset[str]:
        return frozenset({"text"})

    @abstractmethod
    def count(self, texts: Sequence[str], room: int | None = None) -> Array:
        """Statistics of a chunk [S], which add up; its documents are read until the statistics sum to more than
        `room`."""

    def room(self) -> int | None:
        """The sum of the raw corpus's statistics at which it has been read enough; None for all of it."""
        return None

    @abstractmethod
    def fit(self, raw: Array, targets: Sequence[Array]) -> Array:
        """What scores are made with, from the statistics [S] of the raw corpus and of each target."""

    @abstractmethod
    def scores(self, texts: Sequence[str], fitted: Array) -> Array:
        """Scores [n, T] of a chunk, larger is better, for each of T targets that choose apart; minus infinity where
        a document may not be chosen."""

    @abstractmethod
    def choose(self, scores: Array, budget: Budget, rng: np.random.RandomState, targets: Sequence[Array]) -> Array:
        """The documents that stay, ascending, by scores [n, T]; targets: their statistics."""

    def plan(self, examples: Examples, budget: Budget) -> DataPlan:
        if self.reads_target and not examples.targets:
            raise PrunelabError(f"{self.name} compares with a target corpus; give target=")
        targets = [self.total(target.text) for target in examples.targets]
        raw = total(map(self.count, chunks(examples.text)), self.room(), self.count, lambda: chunks(examples.text))
        fitted = self.fit(raw, targets)
        scores = np.concatenate([self.scores(chunk, fitted) for chunk in chunks(examples.text)])
        draws = np.random.RandomState(int(torch.randint(2**31, (), generator=examples.rng)))
        chosen = self.choose(scores, self.budgets(budget)[0], draws, targets)
        return DataPlan(Gather(torch.from_numpy(chosen)[None]))

    def total(self, texts: Iterable[str]) -> Array:
        """Statistics [S] of a whole corpus."""
        return np.sum([self.count(chunk) for chunk in chunks(texts)], axis=0)


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of `CHUNK`."""
    stream = iter(texts)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


def total(counted: Iterable[Array], room: int | None, again: Any, texts: Any) -> Array:
    """The sum of the statistics of chunks in their order, up to the document that fills the room: `again(chunk, room)`
    counts the chunk that does so once more, which is found in `texts()`."""
    whole: Array | None = None
    for place, counts in enumerate(counted):
        before = 0 if whole is None else int(whole.sum())
        if room is not None and before + int(counts.sum()) > room:
            chunk = next(islice(texts(), place, None))
            last = again(chunk, room - before)
            return last if whole is None else whole + last
        whole = counts if whole is None else whole + counts
    assert whole is not None
    return whole
