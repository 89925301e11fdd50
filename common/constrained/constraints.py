"""Constraints on generated text, one token at a time: any predicate, or a regular language as a finite automaton.

A constraint walks along with the text. Its states are opaque; the end token is allowed exactly where the text is
complete, and a text that is complete and cannot grow is `closed`: it ends without an end token.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as syntax  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunelab.common.core.errors import PrunelabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATES = 50_000  # more than any pattern here needs; beyond it a pattern is refused instead of filling the memory
NODES = 10_000_000  # of all states together: (a?){n} has n states of up to n nodes each


class Constraint(ABC):
    """What text may be generated. `end` is the end token, None where the model has none."""

    end: int | None

    @abstractmethod
    def start(self) -> Any:
        """The state before the first token."""

    @abstractmethod
    def step(self, state: Any, token: int) -> Any:
        """The state behind a token that is allowed and not the end."""

    @abstractmethod
    def allows(self, state: Any, token: int) -> bool:
        """Whether a token, or the end, may follow. This is the call that samplers count."""

    @abstractmethod
    def complete(self, state: Any) -> bool:
        """Whether the text may end here."""

    def closed(self, state: Any) -> bool:
        """Whether the text is complete and nothing can follow; False where that is not known."""
        return False


@dataclass(frozen=True)
class Predicate(Constraint):
    """Any constraint as two functions of the tokens so far: whether they begin an allowed text, and whether they are
    one. The state is the tuple of tokens."""

    begins: Callable[[tuple[int, ...]], bool]
    whole: Callable[[tuple[int, ...]], bool]
    end: int | None = None

    def start(self) -> tuple[int, ...]:
        return ()

    def step(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)

    def allows(self, state: tuple[int, ...], token: int) -> bool:
        return self.whole(state) if token == self.end else self.begins((*state, token))

    def complete(self, state: tuple[int, ...]) -> bool:
        return self.whole(state)


@dataclass(frozen=True)
class Automaton:
    """A deterministic finite automaton over the bytes of UTF-8, so that a token may end within a character.

    table: [S + 1, C + 1] int32 next states. State 0 is the start and the last one the sink, from where nothing is
    accepted; every other state can still reach a final one. classes: of the 256 bytes; those that do not exist fall
    into the last class, which leads to the sink. final: [S + 1] bool.
    """

    table: NDArray[np.int32]
    final: NDArray[np.bool_]
    classes: tuple[int, ...] = field(repr=False)

    @property
    def sink(self) -> int:
        return len(self.table) - 1

    def codes(self, text: str | bytes) -> list[int]:
        """The classes of a text's bytes."""
        return [self.classes[byte] for byte in encoded(text)]

    def walk(self, state: int, codes: Sequence[int]) -> int:
        """The state behind some bytes, given as their classes."""
        for code in codes:
            state = self._rows[state][code]
        return state

    def accepts(self, text: str) -> bool:
        """Whether the whole text is in the language."""
        return bool(self.final[self.walk(0, self.codes(text))])

    @cached_property
    def _rows(self) -> list[list[int]]:
        return self.table.tolist()  # a third of the time of reading single entries from an array

    @classmethod
    def of(cls, pattern: str, alphabet: Iterable[str | bytes]) -> Automaton:
        """The texts that a regular expression, in Python's syntax, matches as a whole, of the bytes in an alphabet.

        Raises on what is not regular (look-around, back-references, anchors) and where there is no such text.
        """
        letters = sorted({byte for part in alphabet for byte in encoded(part)})
        nodes = _Nodes(frozenset(letters))
        try:
            tree = syntax.parse(pattern)
        except re.error as error:
            raise PrunelabError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
        if tree.state.flags & ~re.UNICODE:
            raise PrunelabError(f"the pattern {pattern!r} sets flags; write it without them")
        first, last = nodes.sequence(tree)
        # Bytes that no part of the pattern tells apart are one class.
        ranges = np.array([r for edges in nodes.edges for r, _ in edges], dtype=np.int64).reshape(-1, 2)
        order = np.array(letters, dtype=np.int64)
        sets, which = np.unique(ranges, axis=0, return_inverse=True)
        inside = (order >= sets[:, :1]) & (order <= sets[:, 1:])
        members, classes = np.unique(inside, axis=1, return_inverse=True)
        results, keys = [np.flatnonzero(row).tolist() for row in members], iter(which.ravel().tolist())
        edges = [[(results[next(keys)], target) for _, target in out] for out in nodes.edges]
        table, final = _determinise(edges, nodes.empty, first, last, members.shape[1])
        named = dict(zip(letters, classes.ravel().tolist(), strict=True))
        return cls(*_trim(table, final, pattern), tuple(named.get(byte, table.shape[1] - 1) for byte in range(256)))


def encoded(text: str | bytes) -> bytes:
    """The bytes of a text in UTF-8."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


# -- sets of characters ------------------------------------------------------------------------------------------------

Ranges = tuple[tuple[int, int], ...]  # code points, both ends included, ascending and apart
LAST = 0x10FFFF


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same code points as ranges that are apart."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(out[-1][1], high)
        else:
            out.append((low, high))
    return tuple(out)


def others(ranges: Ranges) -> Ranges:
    """All other code points."""
    edges = [-1, *(edge for low, high in ranges for edge in (low - 1, high)), LAST]
    return tuple((low + 1, high) for low, high in zip(edges[::2], edges[1::2]) if low < high)


@cache
def category(name: str) -> Ranges:
    """The code points of a category of Python's `re`: digit, space or word."""
    inside = {"digit": str.isdecimal, "space": str.isspace, "word": lambda c: c.isalnum() or c == "_"}[name]
    flags = np.fromiter(map(inside, map(chr, range(LAST + 1))), dtype=np.int8, count=LAST + 1)
    steps = np.flatnonzero(np.diff(flags, prepend=0, append=0))
    return tuple(zip(steps[::2].tolist(), (steps[1::2] - 1).tolist()))


@cache
def byte_ranges(ranges: Ranges) -> tuple[Ranges, ...]:
    """Sequences of byte ranges that UTF-8 writes code points as, each the product of its ranges."""

    def split(low: int, high: int) -> Iterator[Ranges]:
        for tail in (0x3F, 0xFFF, 0x3FFFF):  # of 1, 2 and 3 bytes behind the first
            if low & ~tail != high & ~tail and (low & tail or high & tail != tail):
                cut = low | tail if low & tail else (high & ~tail) - 1
                yield from split(low, cut)
                yield from split(cut + 1, high)
                return
        yield tuple(zip(chr(low).encode(), chr(high).encode()))

    whole = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, LAST))  # of one length each
    return tuple(
        sequence
        for low, high in ranges
        for first, last in whole
        if max(low, first) <= min(high, last)
        for sequence in split(max(low, first), min(high, last))
    )


# -- from patterns to automata -----------------------------------------------------------------------------------------


class _Nodes:
    """A non-deterministic automaton grown from a pattern's syntax tree (Thompson 1968), over bytes.

    edges: of every node, ranges of bytes with the node they lead to. empty: nodes reached without a byte.
    """

    def __init__(self, letters: frozenset[int]) -> None:
        self.letters = letters
        self._written: dict[Ranges, list[Ranges]] = {}
        self.edges: list[list[tuple[tuple[int, int], int]]] = []
        self.empty: list[list[int]] = []

    def node(self) -> int:
        if len(self.edges) > 4 * STATES:  # before the work that so many would make
            raise PrunelabError(f"the pattern needs more than {STATES} states; make it smaller or less deep")
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1

    def sequence(self, items: Sequence[tuple[Any, Any]]) -> tuple[int, int]:
        """First and last node of what matches one item behind the other."""
        first = last = self.node()
        for kind, value in items:
            begin, end = self.item(kind, value)
            self.empty[last].append(begin)
            last = end
        return first, last

    def item(self, kind: Any, value: Any) -> tuple[int, int]:
        if kind is op.SUBPATTERN and not value[1] and not value[2]:
            return self.sequence(value[3])
        if kind is op.BRANCH:
            return self.either([self.sequence(branch) for branch in value[1]])
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):  # greedy or not, the language is the same
            return self.repeat(*value)
        return self.character(self.characters(kind, value))

    def character(self, ranges: Ranges) -> tuple[int, int]:
        """One character of a set, byte by byte; what begins alike shares its nodes."""
        begin, end = self.node(), self.node()
        known: dict[tuple[tuple[int, int], ...], int] = {(): begin}
        for sequence in self.written(ranges):
            for i in range(len(sequence) - 1):
                if sequence[: i + 1] not in known:
                    known[sequence[: i + 1]] = self.node()
                    self.edges[known[sequence[:i]]].append((sequence[i], known[sequence[: i + 1]]))
            self.edges[known[sequence[:-1]]].append((sequence[-1], end))
        return begin, end

    def written(self, ranges: Ranges) -> list[Ranges]:
        """The sequences of byte ranges that write a set's characters and of which tokens have the bytes."""
        if ranges not in self._written:
            self._written[ranges] = [
                sequence
                for sequence in byte_ranges(ranges)
                if all(any(low <= letter <= high for letter in self.letters) for low, high in sequence)
            ]
        return self._written[ranges]

    def either(self, parts: Sequence[tuple[int, int]]) -> tuple[int, int]:
        begin, end = self.node(), self.node()
        for first, last in parts:
            self.empty[begin].append(first)
            self.empty[last].append(end)
        return begin, end

    def repeat(self, least: int, most: Any, items: Sequence[tuple[Any, Any]]) -> tuple[int, int]:
        begin = last = self.node()
        end = self.node()
        unbounded = most is op.MAXREPEAT
        for count in range(least + 1 if unbounded else most):
            if count >= least:
                self.empty[last].append(end)
            first, after = self.sequence(items)
            self.empty[last].append(first)
            if unbounded and count == least:
                self.empty[after].append(last)
            last = after
        self.empty[last].append(end)
        return begin, end

    def characters(self, kind: Any, value: Any) -> Ranges:
        """Which characters one position of the pattern matches."""
        if kind is op.ANY:
            return others(((10, 10),))  # all but a newline
        if kind is op.LITERAL:
            return ((value, value),)
        if kind is op.NOT_LITERAL:
            return others(((value, value),))
        if kind is op.RANGE:
            return (value,)
        if kind is op.CATEGORY:
            name = str(value).lower().removeprefix("category_")
            ranges = category(name.removeprefix("not_"))
            return others(ranges) if name.startswith("not_") else ranges
        if kind is op.IN:
            negated = value[0][0] is op.NEGATE
            ranges = joined(r for part in value[negated:] for r in self.characters(*part))
            return others(ranges) if negated else ranges
        raise PrunelabError(f"a pattern with {str(kind).lower()} is not a plain regular expression; write it without")


def _determinise(
    edges: Sequence[Sequence[tuple[Sequence[int], int]]],
    empty: Sequence[Sequence[int]],
    first: int,
    last: int,
    size: int,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Subset construction: table [S + 1, size + 1] and final states [S + 1], the sink and its class last."""

    work = 0

    def spent(nodes: int) -> None:
        nonlocal work
        work += nodes
        if work > NODES:
            raise PrunelabError(f"the pattern's states have more than {NODES} parts; make it smaller or less deep")

    @cache
    def closure(node: int) -> frozenset[int]:
        """The nodes reached without a letter; what only passes on adds nothing."""
        results, left = {node}, [node]
        while left:
            fresh = set(empty[left.pop()]) - results
            results |= fresh
            left += fresh
        spent(len(results))
        return frozenset(n for n in results if edges[n] or n == last)

    @cache
    def leads(node: int) -> list[tuple[int, frozenset[int]]]:
        return [(letter, closure(target)) for letters, target in edges[node] for letter in letters]

    numbers = {closure(first): 0}
    rows: list[dict[int, int]] = []
    queue = list(numbers)
    for state in queue:  # grows on the way
        targets: dict[int, set[int]] = {}
        spent(len(state))
        for node in sorted(state):
            for letter, nodes in leads(node):
                targets.setdefault(letter, set()).update(nodes)
        row = {}
        for letter, found in targets.items():
            following = frozenset(found)
            if following not in numbers:
                numbers[following] = len(numbers)
                queue.append(following)
            row[letter] = numbers[following]
        rows.append(row)
        if len(numbers) > STATES:
            raise PrunelabError(f"the pattern needs more than {STATES} states; make it smaller or less deep")
    table = np.full((len(rows) + 1, size + 1), len(rows), dtype=np.int32)
    for i, row in enumerate(rows):
        table[i, list(row)] = list(row.values())
    return table, np.array([last in state for state in numbers] + [False])


def _trim(
    table: NDArray[np.int32], final: NDArray[np.bool_], pattern: str
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Without the states from which no final one can be reached."""
    alive, left = final.copy(), np.flatnonzero(final).tolist()
    by_target = table.argsort(axis=None, kind="stable")
    starts = np.searchsorted(table.ravel()[by_target], np.arange(len(table) + 1))
    while left:  # each step back is taken once
        state = left.pop()
        before = by_target[starts[state] : starts[state + 1]] // table.shape[1]
        fresh = np.unique(before[~alive[before]])
        alive[fresh] = True
        left += fresh.tolist()
    if not alive[0]:
        raise PrunelabError(f"no text over this vocabulary satisfies the pattern {pattern!r}; change the pattern")
    number = np.where(alive, alive.cumsum() - 1, alive.sum()).astype(np.int32)
    kept = np.append(np.flatnonzero(alive), len(table) - 1)
    return number[table[kept]], final[kept]


@dataclass(frozen=True)
class Regular(Constraint):
    """A regular language over a tokenizer's vocabulary; the states are those of the automaton.

    texts: [V] what each token adds to a text, as bytes where these are parts of characters; one that adds nothing is
    never allowed.
    """

    automaton: Automaton
    texts: tuple[str | bytes | None, ...] = field(repr=False)
    end: int | None = None

    @classmethod
    def of(cls, pattern: str, texts: Sequence[str | bytes | None], end: int | None = None) -> Regular:
        """From a regular expression; bytes that no token has do not exist for it."""
        return cls(Automaton.of(pattern, [text for text in texts if text]), tuple(texts), end)

    def start(self) -> int:
        return 0

    def step(self, state: int, token: int) -> int:
        return self.automaton.walk(state, self._codes[token])

    def allows(self, state: int, token: int) -> bool:
        if token == self.end:
            return self.complete(state)
        if token >= len(self.texts) or not self._codes[token]:  # models may have more entries than their tokenizers
            return False
        return self.step(state, token) != self.automaton.sink

    def complete(self, state: int) -> bool:
        return bool(self.automaton.final[state])

    def closed(self, state: int) -> bool:
        return self.complete(state) and bool((self.automaton.table[state] == self.automaton.sink).all())

    def written(self, tokens: Iterable[int]) -> str:
        """The text that tokens write, with a sign of replacement where it ends within a character."""
        return b"".join(encoded(self.texts[token] or "") for token in tokens).decode(errors="replace")

    def mask(self, state: int) -> NDArray[np.bool_]:
        """Every token [V] at once: all walk the automaton side by side, a byte at a time."""
        at = np.full(len(self.texts), state, dtype=np.int32)
        for codes in self._columns:
            at = np.where(codes < 0, at, self.automaton.table[at, codes])
        allowed = (at != self.automaton.sink) & np.array([bool(codes) for codes in self._codes])
        if self.end is not None:
            allowed[self.end] = self.complete(state)
        return allowed

    @cached_property
    def _codes(self) -> list[list[int]]:
        """The classes of every token's bytes, none for one that is never allowed."""
        return [self.automaton.codes(text or "") for text in self.texts]

    @cached_property
    def _columns(self) -> NDArray[np.int32]:
        """The same side by side [L, V], -1 behind the last byte."""
        columns = np.full((max(map(len, self._codes), default=0), len(self._codes)), -1, dtype=np.int32)
        for token, codes in enumerate(self._codes):
            columns[: len(codes), token] = codes
        return columns


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str | bytes | None]:
    """What every token [V] adds to a text, as bytes where that is no whole characters; None for special tokens.

    Tokens are read behind another one, since some tokenizers leave out a blank before the first.
    """
    anchor = tokenizer.convert_tokens_to_ids("a")
    if not isinstance(anchor, int) or tokenizer.decode([anchor]) != "a":
        raise PrunelabError("this tokenizer has no token for the letter a; a constraint cannot read its vocabulary")
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = tokenizer.batch_decode([[anchor, i] for i in range(len(tokenizer))], **options)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [
        _bytes(piece) if "\ufffd" in text else None if len(text) == 1 else text[1:]
        for text, piece in zip(texts, pieces, strict=True)
    ]


def _bytes(piece: str) -> bytes | None:
    """The bytes that a piece of a vocabulary stands for: one letter each in byte-level vocabularies, `<0xE2>` in those
    that fall back on bytes; None where it is written in no such way."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    letters = _byte_letters()
    return bytes(letters[c] for c in piece) if all(c in letters for c in piece) else None


@cache
def _byte_letters() -> dict[str, int]:
    """The letter that byte-level vocabularies write each byte as: itself where it is printable, else one behind 255."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def json_pattern(depth: int) -> str:
    """A regular expression for JSON objects and arrays (RFC 8259), nested at most `depth` deep, with single blanks
    where people put them."""
    if depth < 1:
        raise PrunelabError(f"JSON of depth {depth} holds nothing; give a depth of at least 1")
    text = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
    value = scalar = rf"(?:{text}|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null)"
    for _ in range(depth):
        pair = rf"{text}: ?{value}"
        compound = rf"(?:\{{(?:{pair}(?:, ?{pair})*)?\}}|\[(?:{value}(?:, ?{value})*)?\])"
        value = rf"(?:{scalar}|{compound})"
    return compound
