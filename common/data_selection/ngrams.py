"""Texts as bags of hashed n-grams, and how far apart two corpora are by them.

Shape letters: n documents, M n-grams of all of them, B buckets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np

from prunelab.common.core.errors import PrunelabError

Array = np.ndarray[Any, np.dtype[Any]]

_WORD = re.compile(r"\w+|[^\w\s]+")  # letters and digits, or signs, in a row
_REMEMBERED = 1 << 20  # n-grams whose buckets are kept at hand: pairs in 16 MB, words and longer ones in up to 0.2 GB


def tokens(text: str) -> list[str]:
    """Lower-case words and runs of signs."""
    return _WORD.findall(text.lower())


def bucket_of(ngram: str, buckets: int) -> int:
    """The bucket of an n-gram: its SHA-256, as a number, modulo `buckets`."""
    return int.from_bytes(sha256(ngram.encode("utf-8", "surrogatepass")).digest(), "big") % buckets


class _Buckets(dict[str, int]):
    """The bucket of every n-gram met so far."""

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets

    def __missing__(self, ngram: str) -> int:  # as `bucket_of`: a call for every new n-gram would be felt
        place = int.from_bytes(sha256(ngram.encode("utf-8", "surrogatepass")).digest(), "big") % self.buckets
        self[ngram] = place
        return place


@cache
def _remembered(buckets: int) -> _Buckets:
    return _Buckets(buckets)


@dataclass(frozen=True)
class Bags:
    """Documents as bags: the buckets [M] of all their n-grams, one document after the other, and how many each has
    [n]."""

    places: Array
    sizes: Array

    @property
    def nbytes(self) -> int:
        return int(self.places.nbytes + self.sizes.nbytes)


@dataclass(frozen=True)
class HashedNgrams:
    """Words and n-grams of up to `n` of them, joined by blanks, each in the one of `buckets` that its SHA-256 names."""

    n: int = 2
    buckets: int = 10_000

    def __post_init__(self) -> None:
        if self.n < 1 or self.buckets < 1:
            raise PrunelabError("n-grams have at least one word, and need at least one bucket")

    def places(self, text: str) -> list[int]:
        """The bucket of every n-gram of a text."""
        known, words = _remembered(self.buckets), tokens(text)
        if len(known) > _REMEMBERED:
            known.clear()
        bucket = known.__getitem__
        results = list(map(bucket, words))
        if self.n >= 2:
            results += map(bucket, map(" ".join, pairwise(words)))
        for size in range(3, self.n + 1):
            results += map(bucket, map(" ".join, zip(*(islice(words, start, None) for start in range(size)))))
        return results

    def bags(self, texts: Sequence[str]) -> Bags:
        """The bags of documents."""
        kind = np.min_scalar_type(self.buckets - 1)
        if self.n == 2:
            return _bigram_bags(list(map(tokens, texts)), _remembered_pairs(self.buckets), kind)
        each = [self.places(text) for text in texts]
        sizes = np.fromiter(map(len, each), np.int64, len(each))
        return Bags(np.fromiter(chain.from_iterable(each), kind, int(sizes.sum())), sizes)

    def counts(self, texts: Iterable[str]) -> Array:
        """Counts [B] of a corpus."""
        total = np.zeros(self.buckets, np.int64)
        stream = iter(texts)
        while chunk := list(islice(stream, 1000)):
            total += np.bincount(self.bags(chunk).places, minlength=self.buckets)
        return total

    def words(self, sizes: Array) -> Array:
        """Words [n] of documents by how many n-grams each has (of one with fewer than n words, an estimate)."""
        return (sizes + self.n * (self.n - 1) // 2) // self.n


class _Pairs:
    """Words by number, and the buckets of words and of pairs of them. Pairs that were met lie in a table of fixed size,
    a newer one in place of an older one: on text of many words most of them are seldom."""

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets
        self.words: list[bytes] = []
        self.number = _Numbers()
        self.word_buckets = np.empty(0, np.int64)
        self.bits = _REMEMBERED.bit_length() - 1
        self.codes, self.places = np.full(1 << self.bits, -1, np.int64), np.zeros(1 << self.bits, np.int64)

    def numbers(self, words: Iterable[str], count: int) -> Array:
        """The numbers of words; new ones get the next."""
        result = np.fromiter(map(self.number.__getitem__, words), np.int64, count)
        new = [word.encode("utf-8", "surrogatepass") for word in islice(self.number, len(self.words), None)]
        if new:
            self.words += new
            self.word_buckets = np.concatenate([self.word_buckets, self._hashed(new)])
        return result

    def of(self, first: Array, second: Array) -> Array:
        """The buckets of pairs of words, by their numbers."""
        codes = first << 32 | second
        rows = self._rows(codes)
        result, missing = self.places[rows], self.codes[rows] != codes
        new, indices = np.unique(codes[missing], return_inverse=True)
        one, other = (map(self.words.__getitem__, part.tolist()) for part in (new >> 32, new & 0xFFFFFFFF))
        hashed = self._hashed(list(map(b" ".join, zip(one, other))))
        result[missing] = hashed[indices]
        rows = self._rows(new)
        self.codes[rows], self.places[rows] = new, hashed
        return result

    def _rows(self, codes: Array) -> Array:
        """Where pairs lie in the table: the upper bits of a product with an odd number near 2^64 / 1.618."""
        return (codes.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - self.bits)

    def _hashed(self, ngrams: Sequence[bytes]) -> Array:
        """As `bucket_of`."""
        number, buckets = int.from_bytes, self.buckets
        return np.fromiter((number(sha256(ngram).digest(), "big") % buckets for ngram in ngrams), np.int64, len(ngrams))


class _Numbers(dict[str, int]):
    """A number for every word, in the order of their first mention."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


_PAIRS: dict[int, _Pairs] = {}


def _remembered_pairs(buckets: int) -> _Pairs:
    known = _PAIRS.get(buckets)
    if known is None or len(known.words) > _REMEMBERED:
        known = _PAIRS[buckets] = _Pairs(buckets)
    return known


def _bigram_bags(documents: Sequence[list[str]], known: _Pairs, kind: Any) -> Bags:
    """Bags of words and pairs; of each document the words come first."""
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    total = int(lengths.sum())
    words = known.numbers(chain.from_iterable(documents), total)
    sizes = lengths + np.maximum(lengths - 1, 0)
    document = np.repeat(np.arange(len(documents)), lengths)
    place = np.arange(total) + (np.cumsum(sizes) - sizes - (np.cumsum(lengths) - lengths))[document]
    inside = document[:-1] == document[1:]
    result = np.empty(int(sizes.sum()), kind)
    result[place] = known.word_buckets[words]
    result[(place + lengths[document])[:-1][inside]] = known.of(words[:-1][inside], words[1:][inside])
    return Bags(result, sizes)


def divergence(p: Array, q: Array, epsilon: float = 1e-8) -> float:
    """KL(p || q) in nats of two distributions [B], `epsilon` added to every probability."""
    return float((p * (np.log(p + epsilon) - np.log(q + epsilon))).sum())


def kl_reduction(target: Array, chosen: Array, drawn: Array, epsilon: float = 1e-8) -> float:
    """How much closer a selection comes to a target than a random draw of equal size, from counts [B] of each: the
    fall of KL(target || .) in nats."""
    p, q, r = (counts / max(counts.sum(), 1) for counts in (target, chosen, drawn))
    return divergence(p, r, epsilon) - divergence(p, q, epsilon)
