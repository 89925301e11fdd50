"""DSIR (Xie et al., NeurIPS 2023, arXiv 2302.03169): data selection by importance resampling.

Documents are bags of hashed n-grams. The target and the raw corpus each have a distribution over the buckets, p and q.
A document's importance weight is p(x) / q(x), and documents are drawn by it without replacement (Gumbel top-k).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from string import digits, punctuation
from typing import ClassVar, Literal
from unicodedata import normalize

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeFloat, NonNegativeInt, PositiveInt
from prunelab.common.data_selection.ngrams import Array, Bags, HashedNgrams, divergence, tokens
from prunelab.common.data_selection.streaming import Best, Scores, StreamSelector, blocks


def distribution(counts: Array, smoothing: float = 0.0) -> Array:
    """Probabilities [B] of counts [B], `smoothing` added to each."""
    total = counts.sum() + smoothing * len(counts)
    if total <= 0:
        raise PrunelabError("a corpus has no word at all; give one that has")
    return (counts + smoothing) / total


def log_ratio(target: Array, raw: Array, epsilon: float = 1e-8) -> Array:
    """ln p - ln q [B] of two distributions, with `epsilon` added to the probabilities, not to the counts."""
    return np.log(target + epsilon) - np.log(raw + epsilon)


def log_weights(bags: Bags, ratios: Array) -> Array:
    """Log importance weights [n, T]: for each target its ratios [T, B] summed over the n-grams of every document."""
    document = np.repeat(np.arange(len(bags.sizes)), bags.sizes)
    return np.stack([np.bincount(document, ratio[bags.places], len(bags.sizes)) for ratio in ratios], 1)


def gumbel_top_k(scores: Array, k: int, noise: Array | None) -> Array:
    """The k documents of largest scores [n], ascending, with `noise` [n] added: sampling without replacement in
    proportion to exp(score) where it is Gumbel noise."""
    return np.sort(np.argsort(-(scores if noise is None else scores + noise), kind="stable")[:k])


def shares(k: int, proportions: Sequence[float]) -> list[int]:
    """How many of k documents each target chooses: rounded down, and the rest to the last."""
    each = [int(k * share) for share in proportions[:-1]]
    return [*each, k - sum(each)]


@dataclass(frozen=True)
class Quality:
    """The word statistics by which the paper's own pipeline sorts documents out before (released, `experimental/`). A
    document passes whose statistics all lie strictly between their bounds.

    length: words. repeated: the share of its commonest word. informative: the share of words that are neither stop
    words nor signs. no_digit: the share of words that are no single digit.
    """

    length: tuple[float, float] = (40, 500)
    repeated: tuple[float, float] = (0.02, 0.2)
    informative: tuple[float, float] = (0.3, 0.7)
    no_digit: tuple[float, float] = (0.8, float("inf"))
    stop_words: frozenset[str] = ENGLISH_STOP_WORDS

    def passes(self, text: str) -> bool:
        words = tokens(text)
        if not words:
            return False
        marks = self.stop_words | set(punctuation)
        alike, informative = max(Counter(words).values()), sum(word not in marks for word in words)
        total, plain = len(words), sum(word not in digits for word in words)
        values = (total, alike / total, informative / total, plain / total)
        bounds = (self.length, self.repeated, self.informative, self.no_digit)
        return all(low < value < high for value, (low, high) in zip(values, bounds, strict=True))


@dataclass(frozen=True)
class Documents:
    """Documents as DSIR reads them: their bags, and which may be chosen [n]."""

    bags: Bags
    usable: Array

    @property
    def nbytes(self) -> int:
        return self.bags.nbytes + int(self.usable.nbytes)


@dataclass(frozen=True)
class DSIR(StreamSelector[Documents]):
    """DSIR (arXiv 2302.03169). The target is one corpus or several; several are pooled unless they choose `separate`ly.

    Parameters
    ----------
    ngrams, buckets
        Longest n-gram, and how many buckets they are hashed into.
    min_length
        Words that a document needs (estimated from its n-grams).
    fitted
        n-grams of the raw corpus that q is fitted on, to the end of a document; by default 100,000 a bucket.
    smoothing
        Pseudo-count of every bucket of the target.
    top_k
        The largest weights, without Gumbel noise.
    separate, proportions
        Every target chooses its proportion by itself, one after the other; by default in proportion to its n-grams.
    epsilon
        Added to probabilities before the logarithm.
    quality
        Whether the filter on word statistics sorts out first (`Quality`).
    normal_form : {"NFC", "NFD", "NFKC", "NFKD"}, optional
        Unicode's form that texts are brought to before they are split; by default they are read as they are, so that
        an accent that stands behind its letter splits a word.
    """

    ngrams: PositiveInt = 2
    buckets: PositiveInt = 10_000
    min_length: NonNegativeInt = 100
    fitted: NonNegativeInt | None = None
    smoothing: NonNegativeFloat = 0.0
    top_k: bool = False
    separate: bool = False
    proportions: tuple[NonNegativeFloat, ...] | None = None
    epsilon: NonNegativeFloat = 1e-8
    quality: bool = False
    normal_form: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None

    name: ClassVar[str] = "dsir"

    @property
    def features(self) -> HashedNgrams:
        return HashedNgrams(self.ngrams, self.buckets)

    def room(self) -> int:
        return 100_000 * self.buckets if self.fitted is None else self.fitted

    def read(self, texts: Sequence[str]) -> Documents:
        if self.normal_form is not None:
            texts = [normalize(self.normal_form, text) for text in texts]
        bags = self.features.bags(texts)
        usable = self.features.words(bags.sizes) >= self.min_length
        if self.quality:
            usable &= np.array([Quality().passes(text) for text in texts], dtype=bool)
        return Documents(bags, usable)

    def count(self, features: Documents, room: int | None = None) -> Array:
        bags = features.bags
        last = len(bags.sizes) if room is None else int(np.searchsorted(bags.sizes.cumsum(), room, side="right")) + 1
        return np.bincount(bags.places[: int(bags.sizes[:last].sum())], minlength=self.buckets)

    def fit(self, raw: Array, targets: Sequence[Array]) -> Array:
        apart = targets if self.separate else [np.sum(targets, axis=0)]
        if any(not target[raw > 0].any() for target in apart):
            raise PrunelabError(
                "a target shares no n-gram with the raw corpus, so that nothing tells its documents apart; check"
                " languages and fields of both"
            )
        q = distribution(raw)
        return np.stack([log_ratio(distribution(target, self.smoothing), q, self.epsilon) for target in apart])

    def scores(self, features: Documents, fitted: Array) -> Array:
        return np.where(features.usable[:, None], log_weights(features.bags, fitted), -np.inf)

    def choose(self, scores: Scores, budget: Budget, rng: np.random.RandomState, targets: Sequence[Array]) -> Array:
        k, usable = self.budgets(budget)[0].count(len(scores)), 0
        for _, block in blocks(scores):
            usable += int(np.isfinite(block[:, 0]).sum())
        if k > usable:
            raise PrunelabError(
                f"dsir may choose among {usable} of {len(scores)} documents, the others being shorter than"
                f" {self.min_length} words or sorted out, and is to keep {k}; keep fewer, or lower min_length"
            )
        chosen = np.empty(0, np.int64)
        for place, amount in enumerate(shares(k, self._proportions(targets))):
            best = Best(amount)
            for start, block in blocks(scores):
                left = np.setdiff1d(start + np.flatnonzero(np.isfinite(block[:, 0])), chosen, assume_unique=True)
                own = block[left - start, place]
                best.add(own if self.top_k else own + rng.gumbel(size=len(own)), left)
            chosen = np.sort(np.concatenate([chosen, best.documents]))
        return chosen

    def report(self, raw: Array, targets: Sequence[Array], chosen: Array) -> dict[str, float]:
        target = distribution(np.sum(targets, axis=0))
        before, after = (divergence(target, distribution(counts), self.epsilon) for counts in (raw, chosen))
        return {"KL of the target to the raw corpus, nats": before, "KL of the target to what was chosen, nats": after}

    def _proportions(self, targets: Sequence[Array]) -> Sequence[float]:
        if not self.separate:
            return [1.0]
        if self.proportions is None:
            sizes = [float(target.sum()) for target in targets]
            return [size / sum(sizes) for size in sizes]
        if len(self.proportions) != len(targets) or abs(sum(self.proportions) - 1) > 1e-6 or min(self.proportions) < 0:
            raise PrunelabError(
                f"dsir needs one proportion for each of {len(targets)} targets, all of them 1 together, not"
                f" {self.proportions}"
            )
        return self.proportions
