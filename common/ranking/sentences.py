"""Sentences to rank, the methods that rank them, and summaries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import FiniteFloat, NonNegativeFloat, NonNegativeInt
from prunelab.common.ranking import text
from prunelab.common.ranking.role import Ranker, Ranking, levels
from prunelab.common.ranking.text import Background, Similarity


@dataclass(frozen=True)
class Passage:
    """Sentences to rank: their texts, the document each belongs to and its place there.

    document and position are [n] tuples; a single list of sentences is one document in reading order. background
    is the corpus that idf comes from, for methods that weigh words; see `FeatureRanker` where it is None.
    """

    sentences: tuple[str, ...]
    document: tuple[int, ...] = field(default=())
    position: tuple[int, ...] = field(default=())
    background: Background | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for sentence in self.sentences:
            if not isinstance(sentence, str):
                raise PrunelabError(f"a {type(sentence).__name__} is no sentence; give strings")
        if not self.sentences or not any(s.strip() for s in self.sentences):
            raise PrunelabError("there is no sentence to rank; give at least one that is not empty")
        if not self.document:
            object.__setattr__(self, "document", (0,) * len(self.sentences))
        if not self.position:
            seen: dict[int, int] = {}
            indices = []
            for document in self.document:
                indices.append(seen.get(document, 0))
                seen[document] = indices[-1] + 1
            object.__setattr__(self, "position", tuple(indices))
        if not len(self.sentences) == len(self.document) == len(self.position):
            raise PrunelabError("sentences, document and position differ in length; give one entry a sentence")

    @classmethod
    def of(cls, documents: Sequence[Sequence[str]], background: Background | None = None) -> Passage:
        """A cluster of documents, each a list of sentences."""
        return cls(
            tuple(s for d in documents for s in d),
            tuple(i for i, d in enumerate(documents) for _ in d),
            tuple(j for d in documents for j, _ in enumerate(d)),
            background,
        )

    def __len__(self) -> int:
        return len(self.sentences)

    @cached_property
    def words(self) -> list[list[str]]:
        """The words of each sentence."""
        return [text.words(s) for s in self.sentences]


class Summary(list[str]):
    """The sentences of a summary. tied: whether a sentence left out scores as high as one that is kept, so that the
    order of the text chose between them."""

    def __init__(self, sentences: Sequence[str], tied: bool) -> None:
        super().__init__(sentences)
        self.tied = tied


class SentenceRanker(Ranker[Passage]):
    """Ranks the sentences of a passage."""

    def redundant(self, passage: Passage) -> Callable[[int, list[int]], bool] | None:
        """Tells whether a sentence repeats those already taken; None where the method does not ask."""
        return None

    def take(self, passage: Passage, ranking: Ranking, budget: Budget) -> list[int]:
        sizes = text_sizes(passage.sentences, budget.unit)
        return sorted(fill(ranking.order, sizes, budget, self.redundant(passage)))

    def summarise(self, sentences: Sequence[str] | Passage, budget: Budget) -> Summary:
        """The sentences that `plan` keeps, in document order."""
        if isinstance(sentences, str):
            raise PrunelabError(
                "summarise takes a list of sentences; split the text with prunelab.common.ranking.text.sentences first"
            )
        listed = isinstance(sentences, Iterable) and not isinstance(sentences, bytes | Mapping)
        if not isinstance(sentences, Passage) and not listed:
            raise PrunelabError(f"a {type(sentences).__name__} is no text; give a string, or a list of sentences")
        passage = sentences if isinstance(sentences, Passage) else Passage(tuple(sentences))
        ranking = self.ranking(passage)
        kept = self.take(passage, ranking, budget)
        return Summary([passage.sentences[i] for i in kept], ranking.tied(kept))


@dataclass(frozen=True, kw_only=True)
class FeatureRanker(SentenceRanker):
    """Sentence extraction in MEAD's frame: a salience feature, Position, a length cut-off and a re-ranker.

    Parameters
    ----------
    weight, position
        Weights of the salience feature and of Position, both scaled to [0, 1] over the passage. With position=0 the
        salience itself is the score.
    min_words
        LengthCutoff; sentences with fewer words are never chosen (unless all are that short).
    max_cosine
        A sentence whose cosine with one already chosen exceeds it is skipped; None chooses all.
    without_background
        idf for a passage that brings no background corpus: `sentences` counts each of its sentences as a document,
        `uniform` gives every word the weight 1, `error` refuses.
    """

    weight: FiniteFloat = 1.0
    position: FiniteFloat = 0.0
    min_words: NonNegativeInt = 0
    max_cosine: NonNegativeFloat | None = None
    without_background: Literal["sentences", "uniform", "error"] = "sentences"

    @classmethod
    def mead(cls, weight: float = 1.0, **options: Any) -> Self:
        """With MEAD's policy: Position 1, LengthCutoff 9, and the re-ranker at cosine 0.5."""
        return cls(**{"weight": weight, "position": 1.0, "min_words": 9, "max_cosine": 0.5, **options})

    @abstractmethod
    def salience(self, passage: Passage) -> Tensor:
        """The feature [n] that the method contributes, larger is better."""

    def rank(self, passage: Passage, services: Mapping[str, Any] | None = None) -> Tensor:
        salience = self.salience(passage)
        if self.position == 0:
            return salience
        features = [(self.weight, salience), (self.position, leading(passage.document, passage.position))]
        return sum((w * min_max(f) for w, f in features), torch.zeros(()))

    def order(self, passage: Passage, scores: Tensor) -> list[int]:
        lengths = [len(w) for w in passage.words]
        order: list[int] = selection.descending(levels(scores)).tolist()
        order = [i for i in order if lengths[i]] + [i for i in order if not lengths[i]]  # wordless sentences last
        return [i for i in order if lengths[i] >= self.min_words] or order

    def redundant(self, passage: Passage) -> Callable[[int, list[int]], bool] | None:
        if self.max_cosine is None:
            return None
        similarity, limit = self.similarity(passage), self.max_cosine
        return lambda unit, taken: bool(taken) and bool((similarity.cosines(unit, taken) > limit).any())

    def similarity(self, passage: Passage) -> Similarity:
        """The idf-modified cosine of the passage's sentences, as a linear operator."""
        counts, vocabulary = text.term_counts(passage.words)
        return Similarity.of(counts, self.idf(passage, vocabulary))

    def idf(self, passage: Passage, vocabulary: Sequence[str]) -> text.Array:
        """Weights [V] of the words, from the passage's background corpus or as `without_background` says."""
        if passage.background is not None:
            return passage.background.idf(vocabulary)
        if self.without_background == "error":
            raise PrunelabError("idf needs a background corpus; set Passage.background, or without_background")
        if self.without_background == "uniform":
            return np.ones(len(vocabulary))
        return Background.of(w for w in passage.words if w).idf(vocabulary) if vocabulary else np.ones(0)


def min_max(values: Tensor) -> Tensor:
    """Values [n] scaled linearly so that the largest is 1 and the smallest 0; all 1 where they are equal."""
    low, high = values.min(), values.max()
    return torch.ones_like(values) if bool(high == low) else (values - low) / (high - low)


def leading(document: Sequence[int], position: Sequence[int]) -> Tensor:
    """MEAD's Position feature [n]: 1 for the first sentence of a document, 0 for its last, linear in between."""
    last: dict[int, int] = {}
    for d, p in zip(document, position, strict=True):
        last[d] = max(last.get(d, 0), p)
    return torch.tensor([1 - p / max(last[d], 1) for d, p in zip(document, position, strict=True)], dtype=torch.float64)


def text_sizes(sentences: Sequence[str], unit: str) -> list[int]:
    """What each sentence takes of a budget: 1 (`count`, `ratio`), its `words`, or its UTF-8 `bytes` and a newline."""
    if unit == "words":
        return [text.length(s) for s in sentences]
    if unit == "bytes":
        return [len(s.encode("utf8", "replace")) + 1 for s in sentences]
    return [1] * len(sentences)


def fill(
    order: Sequence[int],
    sizes: Sequence[int],
    budget: Budget,
    redundant: Callable[[int, list[int]], bool] | None = None,
) -> list[int]:
    """Take units in `order` while the budget lasts, skipping those that are `redundant` given the ones taken.

    A unit that no longer fits ends the summary, except that the first one is always taken, so that a budget
    in words or bytes never gives an empty text; cutting to length is left to the metric, as in ROUGE. The newline
    behind the last sentence is not counted: the sentences joined by newlines have at most that many bytes.
    """
    if len(budget.amounts) != 1:
        raise PrunelabError("a summary has one budget; give a single amount")
    if budget.unit in ("words", "bytes"):
        limit = float(budget.amounts[0]) + (budget.unit == "bytes" and budget.amounts[0] > 0)
    elif budget.unit in ("ratio", "count", "removed"):
        limit = float(budget.count(len(sizes)))
    else:
        raise PrunelabError(f"text cannot be budgeted in {budget.unit}; use ratio, count, words or bytes")
    taken: list[int] = []
    used = 0
    for unit in order:
        if used >= limit:
            break
        if redundant is not None and redundant(unit, taken):
            continue
        if taken and used + sizes[unit] > limit:
            break
        taken.append(unit)
        used += sizes[unit]
    return taken
