"""Real Python source as text for language models: the installed packages that this project depends on anyway.

Files are read, never imported or run. What they hold depends on the installed versions, which belong to the identity
of the data. A file belongs to the training text or to the held-out text by the hash of its path, so that it stays
where it is when a version changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Literal["train", "held_out"]

PACKAGES = ("networkx", "numpy", "scipy", "sklearn")
DISTRIBUTIONS = ("networkx", "numpy", "scipy", "scikit-learn")
MARK = "<|file|>"  # the one special token: stands before every file and has id 0

_HELD_OUT = 13  # of 256 values of a hash's first byte: 5 % of the files
_SHORTEST = 500  # characters; what is shorter only re-exports names
_SKIPPED = re.compile(r"tests?|testing|_?vendored|externals?|extern|benchmarks?|array_api\w*")
# What merges never cross: a line break with the indentation behind it, a word, one digit, a run of signs, blanks.
_PIECES = r"\n\s*| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


# -- text ------------------------------------------------------------------------------------------------------------


@cache
def files(split: Split) -> tuple[str, ...]:
    """The source files of a split, in a fixed shuffled order; tests, vendored code and second copies are left out."""
    if split not in get_args(Split):
        raise PrunelabError(f"there is no split '{split}' of the source code; use train or held_out")
    seen: set[str] = set()
    results: list[tuple[bytes, str]] = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise PrunelabError(f"the package {package} is not installed; install this project's requirements")
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            place = path.relative_to(root.parent)
            if any(_SKIPPED.fullmatch(part) for part in place.with_suffix("").parts):
                continue
            text = path.read_text(encoding="utf8", errors="replace")
            if len(text) < _SHORTEST or text in seen:
                continue
            seen.add(text)
            order = hashlib.sha256(place.as_posix().encode()).digest()
            if (order[0] < _HELD_OUT) == (split == "held_out"):
                results.append((order, text))
    return tuple(text for _, text in sorted(results))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level byte-pair encoding with `vocabulary` entries; the same texts give the same tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary <= len(alphabet):
        raise PrunelabError(f"a byte-level vocabulary needs more than {len(alphabet)} entries, not {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[MARK], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> Tensor:
    """All texts as one stream of tokens [n] int32, the mark before each."""
    mark = tokenizer.token_to_id(MARK)
    parts = [torch.tensor([mark, *tokenizer.encode(text).ids], dtype=torch.int32) for text in texts]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)


@cache
def tokenizer(vocabulary: int) -> Tokenizer:
    """The tokenizer of the training files (about 15 seconds)."""
    return train_tokenizer(files("train"), vocabulary)


@cache
def stream(split: Split, vocabulary: int) -> Tensor:
    """A split as one stream of tokens [n] int32 (the training files take about a minute)."""
    return encode(files(split), tokenizer(vocabulary))


def windows(tokens: Tensor, count: int, length: int, draws: torch.Generator | None = None) -> Tensor:
    """Stretches [count, length] int64 of a stream [n]: drawn at random places, or without draws spread evenly."""
    room = len(tokens) - length
    if room < 0:
        raise PrunelabError(
            f"the text has {len(tokens)} tokens, fewer than one sequence of {length}; shorten the length"
        )
    if draws is None:
        starts = torch.linspace(0, room, count).long()
    else:
        starts = torch.randint(room + 1, (count,), generator=draws)
    return tokens[starts.unsqueeze(1) + torch.arange(length)].long()


# -- recall ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recall:
    r"""Sequences of real code that define constants in random places and ask for all of them at the end.

    A definition is a line `key_<word> = <word>`, as long as every other one; both words are drawn at random, so that
    nothing but the context tells the value. The last lines repeat the definitions in another order.

    tokens: [count, length] int64. answers: [pairs] places of the values asked for, the same in every sequence; the
    model predicts each at the place before it. start: where the questions begin.
    """

    tokens: Tensor
    answers: Tensor
    start: int


@dataclass(frozen=True)
class Recalls:
    """Draws recall sequences in the tokens of one tokenizer.

    line: [L] tokens of a definition. key, value: places in it of the two words. keys, values: [W] tokens of the words
    as keys and, behind a blank, as values. opens: [V] bool, tokens that begin a line.
    """

    line: Tensor
    key: int
    value: int
    keys: Tensor
    values: Tensor
    opens: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Recalls:
        """The line, the words and the line breaks in the tokens of this tokenizer.

        Words are what is one token with and without a blank before it.
        """
        vocabulary = tokenizer.get_vocab()
        opens = torch.zeros(len(vocabulary), dtype=torch.bool)
        opens[[i for token, i in vocabulary.items() if token.startswith("Ċ")]] = True
        words = sorted(word for word in vocabulary if re.fullmatch("[a-z]{4,}", word))
        tokens = [tokenizer.encode(text).ids for word in words for text in (word, f" {word}")]
        pairs = [(*key, *value) for key, value in zip(tokens[::2], tokens[1::2]) if len(key) == len(value) == 1]
        if len(pairs) < 2:
            raise PrunelabError("the tokenizer's vocabulary holds no whole words; make it larger")
        keys, values = torch.tensor(pairs).T
        line = tokenizer.encode(
            f"\nkey_{tokenizer.decode(keys[:1].tolist())} ={tokenizer.decode(values[1:2].tolist())}"
        )
        return cls(torch.tensor(line.ids), line.ids.index(keys[0]), line.ids.index(values[1]), keys, values, opens)

    @property
    def words(self) -> Tensor:
        """All tokens that stand for words [2 W]."""
        return torch.cat([self.keys, self.values])

    def shortest(self, pairs: int) -> int:
        """The least length of a sequence with so many pairs; one token of code goes with each definition."""
        return pairs * (2 * len(self.line) + 1)

    def draw(self, code: Tensor, count: int, length: int, pairs: int, draws: torch.Generator) -> Recall:
        """Sequences with `pairs` definitions each before random lines of stretches of the stream `code` [n]."""
        size, shortest = len(self.line), self.shortest(pairs)
        if not 1 <= pairs <= len(self.keys):
            raise PrunelabError(
                f"cannot define {pairs} constants with {len(self.keys)} words; ask for fewer, at least 1"
            )
        if length < shortest:
            raise PrunelabError(f"{pairs} pairs need a length of at least {shortest} tokens, not {length}")
        filler = windows(code, count, length - 2 * pairs * size, draws)  # [count, F]
        keys = torch.rand(count, len(self.keys), generator=draws).argsort(1)[:, :pairs]  # no key twice in a sequence
        lines = self.line.repeat(count, pairs, 1)  # [count, pairs, L]
        lines[..., self.key] = self.keys[keys]
        lines[..., self.value] = self.values[torch.randint(len(self.values), (count, pairs), generator=draws)]

        # Cuts are uniform over line starts; other places serve only where there are too few of those.
        chance = torch.rand(filler.shape, generator=draws) + self.opens[filler]
        cuts = chance.topk(pairs, 1).indices.sort(1).values  # [count, pairs]
        shift = torch.zeros_like(filler).scatter_(1, cuts, 1).cumsum(1) * size
        context = torch.empty(count, length - pairs * size, dtype=torch.int64)
        context.scatter_(1, torch.arange(filler.shape[1]) + shift, filler)
        starts = cuts + size * torch.arange(pairs)  # [count, pairs]
        context.scatter_(1, (starts.unsqueeze(2) + torch.arange(size)).flatten(1), lines.flatten(1))

        order = torch.rand(count, pairs, generator=draws).argsort(1)
        queries = lines[torch.arange(count).unsqueeze(1), order].flatten(1)
        start = context.shape[1]
        return Recall(torch.cat([context, queries], 1), start + size * torch.arange(pairs) + self.value, start)


def repeats(among: Tensor, count: int, length: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences [count, length] of random tokens (of those in `among` [W]) that repeat their beginning, each after a
    length of its own between a quarter and a half of the whole, and a mask of the tokens that the repetition tells."""
    tokens = among[torch.randint(len(among), (count, length), generator=draws)]
    period = torch.randint(length // 4, length // 2, (count, 1), generator=draws)
    indices = torch.arange(length).expand(count, length)
    return tokens.gather(1, indices % period), indices > period


# -- what a model must beat ------------------------------------------------------------------------------------------


def count_models(train: Tensor, test: Tensor, vocabulary: int) -> dict[str, float]:
    """Perplexity of a unigram and a bigram model of the stream `train` on sequences `test` [B, T], on the tokens that
    a language model predicts there: all but the first of each.

    Unigrams are smoothed by adding one, bigrams by interpolation with them (Witten and Bell 1991: the weight of the
    unigrams behind a token is the share of its followers that came for the first time).
    """
    unigram = torch.bincount(train, minlength=vocabulary).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1].long() * vocabulary + train[1:], minlength=vocabulary**2)
    pairs = pairs.view(vocabulary, vocabulary).double()
    seen, kinds = pairs.sum(1, keepdim=True), (pairs > 0).sum(1, keepdim=True)
    bigram = (pairs + kinds * unigram) / (seen + kinds).clamp(min=1)
    bigram = torch.where(seen > 0, bigram, unigram)
    before, after = test[:, :-1], test[:, 1:]
    return {
        "unigram_perplexity": float(unigram[after].log().mean().neg().exp()),
        "bigram_perplexity": float(bigram[before, after].log().mean().neg().exp()),
    }
