"""REST (He et al., NAACL 2024, arXiv 2311.08252): what followed the same words elsewhere is the draft.

A datastore of text in the target's tokens stands in a suffix array. The longest end of the context that occurs there is
looked up, the continuations form a trie, and its most frequent nodes are a tree that one forward pass verifies. Nothing
is trained, and the text stays the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import PositiveInt
from prunelab.common.speculative.role import DraftDecoder
from prunelab.common.speculative.trees import EMPTY, DraftTree, trie

CHUNK = 512 * 1024 * 1024  # tokens that are indexed together (released)


def suffix_array(tokens: Tensor) -> Tensor:
    """Where the suffixes of tokens [M] begin, [M] int64, in lexicographic order; what ends sorts before what goes on.

    Ranks by a prefix give the ranks by one twice as long (Manber and Myers 1990); each round is one sort.
    """
    count, width = len(tokens), 1
    rank = tokens.unique(return_inverse=True)[1]
    while True:
        after = F.pad(rank[width:] + 1, (0, min(width, count)))
        pairs, order = (rank * (count + 1) + after).sort()
        rank[order] = F.pad((pairs.diff() != 0).cumsum(0), (1, 0))
        width *= 2
        if width >= count or int(rank[order[-1]]) == count - 1:
            return order


@dataclass(frozen=True)
class Chunk:
    """A stretch of the datastore: its tokens [M] and their suffix array [M]."""

    tokens: Tensor
    suffixes: Tensor

    def bounds(self, queries: Tensor, lengths: Tensor) -> Tensor:
        """[2, Q] of the suffix array: the first suffix that begins with the first tokens of a query [Q, S], so many as
        `lengths` [Q] says, and the first behind all of them. Bisection takes all queries in step."""
        count, size = len(self.tokens), queries.shape[1]
        columns = torch.arange(size, device=queries.device)
        low = lengths.new_zeros(2, len(queries))
        high = torch.full_like(low, count)
        wanted = torch.tensor([[0], [1]], device=queries.device)  # not before the query; behind it
        for _ in range(count.bit_length()):
            middle = (low + high) // 2
            index = self.suffixes[middle.clamp(max=count - 1)].unsqueeze(-1) + columns  # [2, Q, S]
            seen = self.tokens[index.clamp(max=count - 1)].long().masked_fill(index >= count, EMPTY)
            order = (seen - queries).sign().masked_fill(columns >= lengths.unsqueeze(-1), 0)
            order = order.gather(-1, (order != 0).long().argmax(-1, keepdim=True)).squeeze(-1)
            reached, result = low >= high, order >= wanted
            low, high = torch.where(reached | result, low, middle + 1), torch.where(reached | ~result, high, middle)
        return low

    def behind(self, first: int, last: int, skipped: int, length: int) -> Tensor:
        """What follows `skipped` tokens behind the beginnings of some suffixes, [C, length], EMPTY behind the end."""
        places = self.suffixes[first:last].unsqueeze(1) + skipped
        index = places + torch.arange(length, device=places.device)
        tokens = self.tokens[index.clamp(max=len(self.tokens) - 1)].long()
        return tokens.masked_fill(index >= len(self.tokens), EMPTY)


def _small(index: Tensor) -> Tensor:
    """Places in half the memory, where they fit."""
    return index.int() if len(index) <= torch.iinfo(torch.int32).max else index


@dataclass(frozen=True)
class Datastore:
    """Documents in the target's tokens, one behind the other without a mark between them (released), in chunks."""

    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, documents: Iterable[Tensor], chunk: int = CHUNK) -> Datastore:
        """From documents [n]; a chunk ends before the document that it has no room for."""
        streams: list[list[Tensor]] = [[]]
        size = 0
        for document in documents:
            if size + len(document) > chunk and streams[-1]:
                streams.append([])
                size = 0
            streams[-1].append(document)
            size += len(document)
        joined = [torch.cat(stream) for stream in streams if stream]
        chunks = tuple(Chunk(tokens, _small(suffix_array(tokens))) for tokens in joined if len(tokens))
        if not chunks:
            raise PrunelabError("rest retrieves from a datastore, and this one is empty; give it documents")
        return cls(chunks)

    @cached_property
    def largest(self) -> int:
        """The greatest token id."""
        return max(int(chunk.tokens.max()) for chunk in self.chunks)

    def continuations(self, tokens: Tensor, sizes: Sequence[int], length: int, most: int) -> Tensor:
        """What follows the end of the tokens [N] in the store, [C, length], EMPTY behind the end of a chunk.

        The first of the `sizes`, in tokens of that end, for which anything follows anywhere counts. Each chunk gives
        its first `most` places in the order of the suffix array (released), whatever is frequent.
        """
        sizes = [size for size in sizes if size <= len(tokens)]
        nothing = tokens.new_full((0, length), EMPTY)
        if not sizes:
            return nothing
        ends = torch.stack([F.pad(tokens[-size:], (0, max(sizes) - size)) for size in sizes])
        ends = ends.to(self.chunks[0].tokens.device)
        bounds = [chunk.bounds(ends, ends.new_tensor(sizes)) for chunk in self.chunks]
        for size, *pairs in zip(sizes, *(both.T.tolist() for both in bounds), strict=True):
            results = [
                chunk.behind(first, min(last, first + most), size, length)
                for chunk, (first, last) in zip(self.chunks, pairs, strict=True)
                if first < last
            ]
            paths = torch.cat(results) if results else ends.new_full((0, length), EMPTY)
            paths = paths[paths[:, 0] != EMPTY]
            if len(paths):
                return paths.to(tokens.device)
        return nothing


def prefixes(paths: Tensor) -> tuple[Tensor, Tensor]:
    """Every prefix of the paths [P, L] once, [R, L] with EMPTY behind its end, and how many paths begin with it [R];
    frequent ones first, among equals in the order of their tokens (as the release tends to, whose ties are chance)."""
    if not len(paths):
        return paths, paths.new_zeros(0)
    depth = paths.shape[1]
    for column in reversed(range(depth)):  # rows of equal prefixes come to lie together
        paths = paths[paths[:, column].argsort(stable=True)]
    changed = F.pad(paths[1:] != paths[:-1], (0, 0, 1, 0), value=True).cummax(1).values  # [P, L] a new prefix begins
    group = changed.cumsum(0) - 1
    counts = torch.zeros_like(group).scatter_add_(0, group, torch.ones_like(group))
    row, last = (changed & (paths != EMPTY)).nonzero(as_tuple=True)
    through = counts[group[row, last], last]
    order = through.argsort(descending=True, stable=True)
    row, last = row[order], last[order]
    level = torch.arange(depth, device=paths.device)
    return paths[row].masked_fill(level > last.unsqueeze(1), EMPTY), through[order]


def affordable(paths: Tensor, choices: int) -> Tensor:
    """The paths [K] bool that stay where each costs as many nodes as it has distinct tokens, and all together no more
    than `choices`; the most expensive go first (released).

    Paths [K, L] hold all their prefixes. What they share is counted again and again, so that trees end up far smaller
    than `choices`. A prefix costs no more than what goes on from it and is kept before it.
    """
    tokens = paths.sort(1).values
    new = F.pad(tokens.diff() != 0, (1, 0), value=True) & (tokens != EMPTY)
    cost, depth = new.sum(1), (paths != EMPTY).sum(1)
    order = (cost * (paths.shape[1] + 1) + depth).argsort(stable=True)
    kept = torch.zeros_like(cost, dtype=torch.bool)
    kept[order] = cost[order].cumsum(0) <= choices
    return kept


def arrange(paths: Tensor) -> DraftTree:
    """The tree of all paths [P, L], nodes by depth, and within a depth in the order in which the tokens on the way to
    them first stand at their depths of any path."""
    if not len(paths):
        return trie(paths)[0]
    first = (paths.unsqueeze(0) == paths.unsqueeze(1)).long().argmax(1)  # [P, L] rows
    shape, _ = trie(torch.where(paths == EMPTY, EMPTY, first))
    order = shape.depths.argsort(stable=True)
    indices = F.pad(order.argsort(), (0, 1), value=-1)
    tokens = paths[shape.tokens, shape.depths - 1]
    return DraftTree(tokens[order], indices[shape.parents[order]])


@dataclass(frozen=True)
class REST(DraftDecoder):
    """Retrieval-based speculative decoding (arXiv 2311.08252).

    The service `store` is a `Datastore`, or a stream of the target's tokens [M] to make one of. Without a hit nothing
    is drafted.

    Parameters
    ----------
    longest, shortest : int
        Tokens of the context's end that are looked up; the longest end with a hit counts.
    matches : int
        k, continuations that are looked at in each chunk of the datastore.
    length : int
        Tokens of a continuation.
    choices : int
        c, prefixes of continuations that are kept, and bound of their cost (`affordable`); the budget scales it.
    """

    longest: PositiveInt = 16
    shortest: PositiveInt = 2
    matches: PositiveInt = 5000
    length: PositiveInt = 10
    choices: PositiveInt = 64

    name: ClassVar[str] = "rest"
    services = ("store",)

    def start(self, vocabulary: int, **services: Any) -> Datastore:
        if not 1 <= self.shortest <= self.longest:
            raise PrunelabError(
                f"rest looks up {self.longest} down to {self.shortest} tokens; let 1 <= shortest <= longest"
            )
        store = services["store"]
        if not isinstance(store, Datastore):
            store = Datastore.of([store])
        if store.largest >= vocabulary:
            raise PrunelabError(
                f"the datastore holds the token {store.largest} and the model has {vocabulary} tokens; make it with the"
                " model's tokenizer"
            )
        return store

    def draft(self, state: Datastore, tokens: Tensor, budget: Budget) -> DraftTree:
        sizes = range(self.longest, self.shortest - 1, -1)
        result = state.continuations(tokens, sizes, self.length, self.matches)
        choices = budget.count(self.choices)
        kept = prefixes(result)[0][:choices]
        return arrange(kept[affordable(kept, choices)])
