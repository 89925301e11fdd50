"""MEAD (Radev, Jing, Stys & Tam, Information Processing & Management 40(6), 2004) and the simplest baselines.

A cluster's centroid is a pseudo-document of the words that matter in it. MEAD ranks sentences by how much of the
centroid they hold, by their Position, and by what they repeat; leading and random sentences are what it is
compared with. Position, the length cut-off and the re-ranker are those of `common.ranking.sentences.FeatureRanker`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.options import FiniteFloat, NonNegativeInt
from prunelab.common.ranking import text
from prunelab.common.ranking.sentences import FeatureRanker, Passage, leading
from prunelab.common.ranking.text import Array


def centroid(counts: Array, idf: Array, threshold: float = 0.0) -> Array:
    """Weight [V] of each word in the centroid: its occurrences in the cluster [V] times idf, 0 up to `threshold`."""
    # assumption: tf is the number of occurrences; MEAD's documents also describe the mean over the documents, which
    # ranks alike unless a threshold is set.
    weights = counts * idf
    return np.where(weights > threshold, weights, 0.0)


@dataclass(frozen=True, kw_only=True)
class Centroid(FeatureRanker):
    """MEAD's centroid score of a sentence (Information Processing & Management 40(6), 2004, section 3): the sum of the
    centroid's weights over all of its word occurrences.

    Parameters
    ----------
    threshold
        Words of no more than this weight are left out of the centroid.
    weight, position, min_words, max_cosine, without_background
        The frame that the scores are used in, see `FeatureRanker`.
    """

    threshold: FiniteFloat = 0.0

    name: ClassVar[str] = "centroid"

    def salience(self, passage: Passage) -> Tensor:
        counts, vocabulary = text.term_counts(passage.words)
        weights = centroid(counts.sum(0), self.idf(passage, vocabulary), self.threshold)
        return torch.from_numpy(np.asarray(counts @ weights))


@dataclass(frozen=True, kw_only=True)
class Lead(FeatureRanker):
    """The lead baseline of LexRank's and MEAD's evaluations: Position alone, so first the first sentence of every
    document."""

    name: ClassVar[str] = "lead"

    def salience(self, passage: Passage) -> Tensor:
        return leading(passage.document, passage.position)


@dataclass(frozen=True, kw_only=True)
class RandomSentences(FeatureRanker):
    """The random baseline of LexRank's evaluation: scores drawn evenly from [0, 1), from the seed and the text.

    Parameters
    ----------
    seed
        Other seeds, other draws.
    """

    seed: NonNegativeInt = 0

    name: ClassVar[str] = "random_sentences"

    def salience(self, passage: Passage) -> Tensor:
        drawn_from = "\n".join((str(self.seed), *passage.sentences)).encode("utf8", "replace")
        rng = torch.Generator().manual_seed(zlib.crc32(drawn_from))
        return torch.rand(len(passage.sentences), generator=rng, dtype=torch.float64)
