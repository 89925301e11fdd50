"""LexRank as two widely used libraries compute it. Neither jumps, so neither is the paper's LexRank.

sumy: idf from the sentences of the document itself, no guaranteed self links, and a power method that is scaled to
length 1 and stops at a change of 0.1. crabcamp (package `lexrank`): edges at or above the threshold, and a walk
within each connected component, whose scores sum to the size of the component.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from prunelab.common.core import selection
from prunelab.common.ranking.sentences import Passage, SentenceRanker
from prunelab.common.ranking.text import Array, Background, Similarity, term_counts, threshold_graph

# -- sumy ------------------------------------------------------------------------------------------------------------


def sumy_frequencies(counts: Array) -> Array:
    """Counts [n, V] divided by the largest count of each sentence, which cancels in the cosine."""
    return np.asarray(counts / np.maximum(counts.max(1, initial=0, keepdims=True), 1))


def sumy_idf(counts: Array) -> Array:
    """ln(n / (1 + sentences with the word)) [V]: 0 or negative for words of nearly every sentence."""
    return np.asarray(np.log(counts.shape[0] / (1 + (counts > 0).sum(0))))


def sumy_similarity(frequencies: Array, idf: Array) -> Array:
    """Cosines [n, n]; the diagonal is computed like the rest, so it is 0 where a vector is zero."""
    return Similarity.of(sparse.csr_array(frequencies), idf, self_links=False).dense()


def sumy_transition(cosines: Array, threshold: float = 0.1) -> Array:
    """The thresholded graph with rows scaled to sum 1; a sentence without a link has a row of zeros."""
    graph = threshold_graph(cosines, threshold).toarray().astype(float)
    return np.asarray(graph / np.maximum(graph.sum(1, keepdims=True), 1))


def sumy_scores(transition: Array, epsilon: float = 0.1) -> Tensor:
    """Power method on the transposed matrix, scaled to length 1 at each step; zeros where nothing is linked."""
    reach = torch.from_numpy(transition.T.copy())

    def step(p: Tensor) -> Tensor:
        return torch.nn.functional.normalize(reach @ p, dim=0, eps=torch.finfo(p.dtype).tiny)

    start = torch.full((len(transition),), 1 / len(transition), dtype=torch.float64)
    return selection.power_iteration(step, start, 10_000, epsilon)


@dataclass(frozen=True, kw_only=True)
class SumyLexRank(SentenceRanker):
    """LexRank of the package sumy (0.11), with our words instead of its tokenisers.

    Parameters
    ----------
    threshold
        Cosine above which two sentences are linked.
    epsilon
        L2 change at which the power method stops.
    """

    threshold: float = 0.1
    epsilon: float = 0.1

    name: ClassVar[str] = "lexrank-sumy"

    def rank(self, passage: Passage, services: Mapping[str, Any] | None = None) -> Tensor:
        counts = term_counts(passage.words)[0].toarray()
        cosines = sumy_similarity(sumy_frequencies(counts), sumy_idf(counts))
        return sumy_scores(sumy_transition(cosines, self.threshold), self.epsilon)


# -- crabcamp --------------------------------------------------------------------------------------------------------

_EMAIL = re.compile(r"[^\W_][\w.+-]*[\w+-]@[^\W_][\w.-]*\.[^\W\d_]+")
_SEPARATORS = re.compile('[.,;:¡!¿?…⋯&‹›«»"“”\\[\\]()⟨⟩}{/|\\\\\\s]+')


def crabcamp_words(text: str, stop_words: Collection[str] = (), keep_numbers: bool = False) -> list[str]:
    """Lower-case runs between punctuation and white space, reduced to letters, digits and hyphens.

    E-mail addresses go; so do stop words, words without a letter or digit, and, unless `keep_numbers`, words with
    a digit.
    """
    kept = []
    for run in _SEPARATORS.split(_EMAIL.sub(" ", text).lower()):
        word = "".join(c for c in run if c.isalnum() or c == "-")
        digits = any(c.isdigit() for c in word)
        letters = any(c.isalpha() for c in word)
        if word not in stop_words and (letters or digits) and (keep_numbers or not digits):
            kept.append(word)
    return kept


def crabcamp_weights(cosines: Array, threshold: float | None = None) -> Array:
    """The graph [n, n]: 1 where the cosine is at or above the threshold; without one the cosines themselves."""
    return cosines if threshold is None else (cosines >= threshold).astype(float)


def crabcamp_transition(weights: Array) -> Array:
    """Rows of the graph scaled to sum 1."""
    return np.asarray(weights / weights.sum(1, keepdims=True))


def crabcamp_components(transition: Array) -> Array:
    """The connected component [n] of each sentence, numbered by first occurrence."""
    return np.asarray(connected_components(sparse.csr_array(transition))[1])


def crabcamp_scores(transition: Array, squaring: bool = True) -> Array:
    """Power method from all ones in each component, whose scores sum to its size.

    `squaring` doubles the length of the walk at each step. Stops when no score changes by more than a hundred
    thousandth of itself.
    """
    scores = np.ones(len(transition))
    labels = crabcamp_components(transition)
    for label in range(labels.max(initial=-1) + 1):
        members = np.flatnonzero(labels == label)
        if len(members) == 1:
            continue
        walk, state = transition[np.ix_(members, members)].T, scores[members]
        for _ in range(64 if squaring else 1_000_000):
            previous, state = state, np.dot(walk, state)
            if np.allclose(state, previous):
                break
            walk = np.dot(walk, walk) if squaring else walk
        scores[members] = state
    return scores


def crabcamp_order(scores: Array) -> Array:
    """Sentences from best to worst; equal scores come out in reverse order (for few sentences)."""
    return np.argsort(scores)[::-1]


@dataclass(frozen=True, kw_only=True)
class CrabcampLexRank(SentenceRanker):
    """LexRank of the package `lexrank` (0.1). Without a background corpus each sentence counts as a document of it.

    Parameters
    ----------
    threshold
        Cosine from which on two sentences are linked; None is the package's continuous mode.
    unseen
        idf of words that the corpus lacks (the package: 1, or 0 where new words are not to count).
    keep_numbers
        Whether words with a digit count.
    stop_words
        Words that do not.
    """

    threshold: float | None = 0.03
    unseen: float = 1.0
    keep_numbers: bool = False
    stop_words: tuple[str, ...] = ()

    name: ClassVar[str] = "lexrank-crabcamp"

    def rank(self, passage: Passage, services: Mapping[str, Any] | None = None) -> Tensor:
        tokens = [crabcamp_words(s, self.stop_words, self.keep_numbers) for s in passage.sentences]
        counts, vocabulary = term_counts(tokens)
        if not vocabulary:
            return torch.ones(len(tokens), dtype=torch.float64)
        background = passage.background or Background.of(tokens)
        cosines = Similarity.of(counts, background.idf(vocabulary, self.unseen)).dense()
        return torch.from_numpy(crabcamp_scores(crabcamp_transition(crabcamp_weights(cosines, self.threshold))))

    def order(self, passage: Passage, scores: Tensor) -> list[int]:
        return [int(i) for i in crabcamp_order(scores.numpy())]
