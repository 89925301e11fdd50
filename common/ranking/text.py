"""Text as the extractive methods see it: words, sentences, counts, idf, and similarity as a linear operator.

Letters: n sentences, V words of the vocabulary, N documents of the background corpus, n_w of them with word w.
Nothing is downloaded and no language model is involved; the rules are made for English and its relatives, and do no
harm to other scripts.
"""
# ruff: noqa: SIM905  lists of words are read as text

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from scipy import sparse

from prunelab.common.core.errors import PrunelabError

Array = np.ndarray[Any, np.dtype[Any]]

# -- words and sentences ---------------------------------------------------------------------------------------------

# Letters of scripts that put no blanks between words; each counts as a word, since no dictionary is at hand.
_UNSPACED = (
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46"  # Thai
    "\u0e80-\u0eff\u1000-\u109f\u1780-\u17d3"  # Lao, Burmese, Khmer
    "\u3005-\u3007\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Japanese, Chinese
)
_LETTER = re.compile(rf"[{_UNSPACED}]")
_END = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’)\]]*+\s+"""  # a run of marks as a whole: trying every part of it squares the time
    r"""|[।॥؟۔։።။།༎។៕᠃]++["'”’)\]]*+\s+"""  # Indic, Arabic, Armenian, Ethiopic, Burmese, Tibetan, Khmer, Mongolian
    r"""|[。！？｡]++[」』”’）】"')\]]*+\s*"""  # Chinese and Japanese, which put no blank behind them
)
_OPENING = "\"'“‘([{"
_INNER_DOTS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
# A full stop behind one of these never ends a sentence,
_NEVER_LAST = frozenset(
    "mr mrs ms dr prof rev hon gov sen rep gen col capt lt sgt st mt messrs mme mlle e.g i.e cf vs viz fig figs eq eqs"
    " sec vol pp ca approx resp".split()
)
# behind one of these none before a number (No. 5, Smith et al. (2004), Jan. 3),
_BEFORE_NUMBERS = frozenset("no nos al jan feb mar apr jun jul aug sep sept oct nov dec".split())
# and behind a number none before one of these (am 31. August).
_MONTHS = frozenset("Januar Jänner Februar März April Mai Juni Juli August September Oktober November Dezember".split())
# Behind initials such as U.S. only these words are taken for the start of the next sentence.
_STARTERS = frozenset("The A An It He She They We In On At This That These Those But And If For As".split())


@cache
def _word(marks: str) -> re.Pattern[str]:
    """What a word is in a text that holds these combining marks, which belong to the letter before them."""
    within = rf"(?:[^\W_{_UNSPACED}]|[{re.escape(marks)}])*" if marks else rf"[^\W_{_UNSPACED}]*"
    run, mark = rf"[^\W_{_UNSPACED}]{within}", rf"[{re.escape(marks)}]*" if marks else ""
    return re.compile(rf"\d+(?:[.,]\d+)+|{run}(?:['’-]{run})*|[{_UNSPACED}]{mark}")


def words(text: str) -> list[str]:
    """Words in lower case: runs of letters and digits, with inner hyphens, apostrophes, and points in numbers.

    However accents are encoded, the words are the same. Combining marks and joiners belong to the letter before them;
    in scripts without blanks every letter is a word.
    """
    if text.isascii():
        return _word("").findall(text.lower())
    text = unicodedata.normalize("NFC", text.replace("\u00ad", "")).lower()
    marks = (c for c in set(text) if unicodedata.category(c)[0] == "M" or c in "\u200c\u200d")
    return [w.replace("’", "'") for w in _word("".join(sorted(marks))).findall(text)]


def sentences(text: str) -> list[str]:
    """Sentences of running text, white space normalised.

    A sentence ends at . ! ? or an ellipsis (closing quotes and brackets included) before white space, unless the
    next word starts in lower case or the full stop belongs to an abbreviation, to an initial (J. Smith), to a number
    (No. 5), or to letters with inner stops (U.S. Army) before anything but a typical first word. Marks of other scripts
    end one too, those of Chinese and Japanese without white space. A blank line always ends one.
    """
    split = []
    for paragraph in re.split(r"\n\s*\n", text.removeprefix("\ufeff")):
        paragraph, start = " ".join(paragraph.split()), 0
        for match in _END.finditer(paragraph):
            if _ends(paragraph, start, match):
                split.append(paragraph[start : match.end()].rstrip())
                start = match.end()
        if start < len(paragraph):
            split.append(paragraph[start:])
    return split


def _ends(paragraph: str, start: int, match: re.Match[str]) -> bool:
    """Whether the punctuation of a match ends the sentence that began at `start`. Looks at what lies beside it."""
    place = match.end()
    while paragraph[place : place + 1] and paragraph[place] in _OPENING:
        place += 1
    first = paragraph[place : place + 1]
    if not first or first.islower():
        return not first
    last = paragraph[max(paragraph.rfind(" ", start, match.start()) + 1, start) : match.start()].lstrip(_OPENING)
    if match[0].rstrip() != "." or not last:
        return True
    if last.lower() in _NEVER_LAST or (len(last) == 1 and last.isupper()):
        return False
    if last.lower() in _BEFORE_NUMBERS and first.isdigit():
        return False
    end = paragraph.find(" ", match.end())
    following = paragraph[match.end() : end if end >= 0 else len(paragraph)]
    if last.isdigit() and following.rstrip(",.;:!?") in _MONTHS:
        return False
    return not _INNER_DOTS.fullmatch(last) or following in _STARTERS


def length(sentence: str) -> int:
    """Words of a sentence as a budget counts them: what blanks part, and every letter of a script without blanks."""
    letters = 0 if sentence.isascii() else len(_LETTER.findall(sentence))
    if not letters:
        return len(sentence.split())
    return letters + sum(any(c.isalnum() for c in part) for part in _LETTER.sub(" ", sentence).split())


# -- counts and idf --------------------------------------------------------------------------------------------------


def term_counts(
    tokens: Sequence[Sequence[str]], vocabulary: Sequence[str] | None = None
) -> tuple[sparse.csr_array, list[str]]:
    """Raw counts [n, V] of the tokens of each sentence, and the V words in column order.

    Columns are in order of first occurrence, or those of `vocabulary`; words outside of it are left out.
    """
    column: dict[str, int] = {w: i for i, w in enumerate(vocabulary)} if vocabulary is not None else {}
    index: list[int] = []
    count: list[int] = []
    ends = [0]
    for sentence in tokens:
        for word, times in Counter(sentence).items():
            place = column.get(word) if vocabulary is not None else column.setdefault(word, len(column))
            if place is not None:
                index.append(place)
                count.append(times)
        ends.append(len(index))
    shape = (len(tokens), len(column))
    return sparse.csr_array((np.array(count, float), np.array(index, np.int32), np.array(ends)), shape), list(column)


@dataclass(frozen=True)
class Background:
    """A background corpus as idf needs it: the number N of its documents and n_w for each word w."""

    documents: int
    containing: Mapping[str, int] = field(repr=False)

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise PrunelabError("a background corpus needs at least one document that has words")

    @classmethod
    def of(cls, documents: Iterable[Iterable[str]]) -> Background:
        """From the tokens of each document. Documents without a word do not count."""
        containing: Counter[str] = Counter()
        total = 0
        for document in documents:
            distinct = set(document)
            containing.update(distinct)
            total += bool(distinct)
        return cls(total, containing)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Background:
        """From running text, one string a document."""
        return cls.of(words(text) for text in texts)

    def idf(self, vocabulary: Iterable[str], unseen: float | None = None) -> Array:
        """ln(N / n_w) [V]. A word that the corpus lacks gets `unseen`, or ln N as if one document had it."""
        # assumption: the paper does not say what words outside its corpus weigh; ln N is the largest seen value.
        missing = np.log(self.documents) if unseen is None else unseen
        seen = [self.containing.get(w, 0) for w in vocabulary]
        return np.array([np.log(self.documents / n) if n else missing for n in seen], float)


# -- similarity ------------------------------------------------------------------------------------------------------


_BLOCK = 2**25  # cosines in memory at a time while a graph is made


@dataclass(frozen=True)
class Similarity:
    """The idf-modified cosine between all sentences, never stored as an [n, n] array.

    vectors [n, V'] holds one tf-idf vector of unit length a sentence, so that the matrix of cosines is
    vectors @ vectors.T. `similarity @ v` applies it to a vector in the time of one pass over the words.

    A sentence whose vector is zero (no words, or only words of idf 0) gets a column to itself: its cosine with
    itself is then 1 as everywhere, and 0 with all others. `self_links=False` leaves it without any link.
    """

    vectors: sparse.csr_array

    @classmethod
    def of(cls, counts: sparse.csr_array, idf: Array, self_links: bool = True) -> Similarity:
        """From counts [n, V] (any scaling of a row cancels) and idf [V]."""
        weighted = sparse.csr_array(counts.multiply(np.asarray(idf, float)[None, :]))
        norm = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
        weighted.data /= np.repeat(np.where(norm > 0, norm, 1), np.diff(weighted.indptr))
        weighted.eliminate_zeros()
        empty = np.flatnonzero(norm == 0) if self_links else np.empty(0, int)
        if empty.size:
            own = sparse.csr_array((np.ones(empty.size), (empty, np.arange(empty.size))), (len(norm), empty.size))
            weighted = sparse.csr_array(sparse.hstack([weighted, own], format="csr"))
        return cls(weighted)

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors.shape[0], self.vectors.shape[0]

    def __matmul__(self, v: Array) -> Array:
        return np.asarray(self.vectors @ (self.vectors.T @ v))

    def cosines(self, sentence: int, others: Sequence[int]) -> Array:
        """Cosines of one sentence with some others."""
        return np.asarray((self.vectors[list(others)] @ self.vectors[[sentence]].T).toarray()).ravel()

    def dense(self) -> Array:
        """All cosines [n, n]; for a page's figure and for tests, not for ranking."""
        matrix = np.asarray((self.vectors @ self.vectors.T).toarray())
        linked = np.diff(self.vectors.indptr) > 0
        matrix[linked, linked] = 1.0
        return matrix

    def graph(self, threshold: float) -> sparse.csr_array:
        """The 0/1 adjacency [n, n]: an edge where the cosine is strictly above the threshold, and self links.

        Blocks of rows are compared with all sentences before them. Words that many sentences share make a sparse
        product slow, so these few columns go through a dense product and only the rest through a sparse one.
        From 10,000 sentences on cosines are in single precision: a pair within 1e-7 of the threshold may differ.
        """
        sentences = self.vectors.shape[0]
        vectors = self.vectors.astype(np.float64 if sentences < 10_000 else np.float32)
        common = np.bincount(vectors.indices, minlength=vectors.shape[1]) > sentences / 16
        dense = vectors[:, np.flatnonzero(common)].toarray()
        rare = vectors[:, np.flatnonzero(~common)]
        other = sparse.csr_array(rare.T)
        block = max(1, _BLOCK // sentences)
        counts = np.zeros(sentences + 1, np.int64)
        columns = []
        for start in range(0, sentences, block):
            stop = min(start + block, sentences)
            cosine = (rare[start:stop] @ other[:, :stop]).toarray()
            cosine += dense[start:stop] @ dense[:stop].T
            above = cosine > threshold
            above[:, start:] = np.tril(above[:, start:], -1)
            counts[start + 1 : stop + 1] = np.count_nonzero(above, axis=1)
            columns.append((np.flatnonzero(above) % stop).astype(np.int32))
        index = np.concatenate(columns)
        below = sparse.csr_array((np.ones(index.size, np.int8), index, counts.cumsum()), (sentences, sentences))
        linked = np.flatnonzero(np.diff(self.vectors.indptr))  # every sentence, unless self_links=False
        self_links = sparse.csr_array((np.ones(linked.size, np.int8), (linked, linked)), below.shape)
        return sparse.csr_array(below + below.T + self_links)


def threshold_graph(cosines: Array, threshold: float) -> sparse.csr_array:
    """The 0/1 adjacency of a matrix of cosines [n, n] that is at hand: strictly above the threshold.

    The comparison is made in the matrix's own precision, so that a printed 0.20 is not above 0.2.
    """
    return sparse.csr_array((cosines > threshold).astype(np.int8))
