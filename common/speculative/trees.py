"""Draft trees of speculative decoding: their shape, the part of them that a model confirms, and trees made of paths.

Shape letters: N tokens of the sequence, T nodes of the tree, L its depth, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt

Path = tuple[NonNegativeInt, ...]
EMPTY = -1  # in rows of tokens: nothing here


@dataclass(frozen=True)
class DraftTree:
    """Draft tokens [T] with the index of each one's parent [T], -1 for children of the last accepted token.
    Parents come before their children. The same path of tokens may stand in a tree more than once."""

    tokens: Tensor
    parents: Tensor

    @cached_property
    def ancestors(self) -> Tensor:
        """[T, T] bool: whether node j is node i itself or stands on the way to it; the tree's attention mask."""
        count = len(self.parents)
        result = torch.eye(count + 1, dtype=torch.bool, device=self.parents.device)
        result[count] = False  # the last row is that of index -1
        jump = torch.cat([self.parents, self.parents.new_tensor([-1])])
        while bool((jump >= 0).any()):  # twice as far up each time
            result = result | result[jump]
            jump = jump[jump]
        return result[:count, :count]

    @cached_property
    def depths(self) -> Tensor:
        """[T] int64, 1 for children of the last accepted token."""
        return self.ancestors.sum(1)

    @cached_property
    def paths(self) -> Tensor:
        """[T, L] the tokens on the way to each node, its own last; EMPTY behind it."""
        rows, columns = self.ancestors.nonzero(as_tuple=True)
        depth = int(self.depths.max()) if len(self.tokens) else 0
        out = self.tokens.new_full((len(self.tokens), depth), EMPTY)
        out[rows, self.depths[columns] - 1] = self.tokens[columns]
        return out

    def refill(self, tokens: Tensor) -> DraftTree:
        """A tree of the same shape with other tokens [T]; what is known of the shape is not computed again."""
        tree = DraftTree(tokens, self.parents)
        shape = ("ancestors", "depths")
        tree.__dict__.update({name: value for name, value in vars(self).items() if name in shape})
        return tree

    def where(self, kept: Tensor) -> DraftTree:
        """The nodes kept [T] bool, among which are the parents of each."""
        if bool(kept.all()):
            return self
        places = torch.cat([kept.cumsum(0) - 1, kept.new_tensor([-1], dtype=torch.long)])
        return DraftTree(self.tokens[kept], places[self.parents[kept]])

    def within(self, depth: int) -> DraftTree:
        """The nodes no deeper than that."""
        return self.where(self.depths <= depth) if len(self.tokens) else self

    def beside(self, other: DraftTree) -> DraftTree:
        """Both trees behind the same token, this one's nodes first; no node is shared."""
        parents = torch.where(other.parents >= 0, other.parents + len(self.tokens), -1)
        tree = DraftTree(torch.cat([self.tokens, other.tokens]), torch.cat([self.parents, parents]))
        tree.__dict__["ancestors"] = torch.block_diag(self.ancestors, other.ancestors)
        return tree


@dataclass(frozen=True)
class Accepted:
    """Tokens [A] to emit and the draft nodes [A - 1] (or fewer) whose cache entries stay."""

    tokens: Tensor
    nodes: Tensor


def longest(tree: DraftTree, agrees: Tensor, chosen: Tensor, preference: Tensor | None = None) -> Accepted:
    """The longest path of which every node agrees [T] bool, and what the model chose behind its end.

    chosen: [T + 1] the model's token behind the last accepted token (row 0) and behind every node. Among equally long
    paths the one counts that ends in the node of largest `preference` [T], and of those the first in tree order.
    """
    confirmed = (agrees | ~tree.ancestors).all(1)  # with all nodes above
    if not bool(confirmed.any()):
        return Accepted(chosen[:1], torch.arange(0, device=chosen.device))
    length = torch.where(confirmed, tree.depths, 0)
    ends = (length == length.max()).nonzero().squeeze(1)
    end = ends[0] if preference is None else ends[preference[ends].argmax()]
    nodes = tree.ancestors[end].nonzero().squeeze(1)
    return Accepted(torch.cat([tree.tokens[nodes], chosen[nodes[-1:] + 1]]), nodes)


def follow(tree: DraftTree, chosen: Tensor) -> Accepted:
    """The longest path of which every token is the one that the model chose behind its parent, and the choice behind
    its end; chosen as in `longest`."""
    return longest(tree, tree.tokens == chosen[tree.parents + 1], chosen)


def greedy(tree: DraftTree, logits: Tensor) -> Accepted:
    """What greedy decoding by the logits [T + 1, V] (row 0: behind the last accepted token) confirms."""
    return follow(tree, logits.argmax(-1))


def sample(tree: DraftTree, logits: Tensor, rng: torch.Generator) -> Accepted:
    """What sampling from the logits [T + 1, V] confirms: tokens are distributed as without a tree.

    Drafts here are certain proposals. For those, recursive rejection over several candidates (accept x with p(x), else
    go on without x) amounts to drawing one token from p and following it where the tree has it. Nodes with the same
    path share one draw: otherwise the longest of several draws would win, which is not lossless.
    """
    draws = torch.multinomial(logits.float().softmax(-1), 1, generator=rng).squeeze(1)
    paths = tree.paths
    order = torch.arange(len(paths), device=logits.device)
    same = (paths.unsqueeze(1) == paths.unsqueeze(0)).all(-1)
    first = torch.where(same, order, len(paths)).amin(1) if len(paths) else order
    return follow(tree, draws[torch.cat([first.new_zeros(1), first + 1])])


def trie(paths: Tensor) -> tuple[DraftTree, Tensor]:
    """The tree of all paths [P, L] of tokens, EMPTY behind the end of each, in which every prefix stands once, and how
    many paths go through each node [T]. Siblings come in the order of their tokens."""
    depth = paths.shape[1]
    level = torch.arange(depth, device=paths.device)
    prefixes = paths.unsqueeze(1).masked_fill(level > level.unsqueeze(1), EMPTY)  # [P, L, L]
    rows = prefixes[paths != EMPTY]
    if not len(rows):
        return DraftTree(paths.new_zeros(0), paths.new_zeros(0)), paths.new_zeros(0)
    # Rows come out sorted, so that a prefix, which has EMPTY (-1) in its end, precedes what goes on from it.
    rows, through = rows.unique(dim=0, return_counts=True)
    last = (rows != EMPTY).sum(1) - 1
    above = rows.scatter(1, last.unsqueeze(1), EMPTY)
    parent = (above.unsqueeze(1) == rows.unsqueeze(0)).all(-1)  # [T, T]
    parents = torch.where(parent.any(1), parent.long().argmax(1), -1)
    return DraftTree(rows.gather(1, last.unsqueeze(1)).squeeze(1), parents), through


def fuse(first: DraftTree, second: DraftTree) -> DraftTree:
    """Both trees as one, the second hung into the first behind the longest prefix they share."""
    paths = [first.paths, second.paths]
    depth = max(p.shape[1] for p in paths)
    padded = [torch.nn.functional.pad(p, (0, depth - p.shape[1]), value=EMPTY) for p in paths]
    return trie(torch.cat(padded))[0]


def paths_of(children: Sequence[Sequence[int]]) -> tuple[Path, ...]:
    """Every node as the ranks on the way to it, from the numbers of children by level."""
    levels: list[list[Path]] = [[()]]
    for counts in children:
        levels.append([(*p, rank) for p, n in zip(levels[-1], counts, strict=True) for rank in range(n)])
    return tuple(path for level in levels[1:] for path in level)


@dataclass(frozen=True)
class Template:
    """Shape of the trees: for each draft node its parent [T] (-1: the root), which of the parent's candidates it takes
    [T], and the bounds of the levels, as node numbers from 0 to T."""

    parents: Tensor
    ranks: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Template:
        """From paths of ranks in the order of the nodes, which goes by depth."""
        place = {path: i for i, path in enumerate(paths)}
        if () in place or len(place) < len(paths) or list(map(len, paths)) != sorted(map(len, paths)):
            raise PrunelabError("a draft tree lists each path of ranks once, short ones first, and not the root")
        orphans = [path for path in paths if len(path) > 1 and path[:-1] not in place]
        if orphans:
            raise PrunelabError(f"the draft tree has the node {orphans[0]} but not its parent; add {orphans[0][:-1]}")
        parents = torch.tensor([place.get(path[:-1], -1) for path in paths], dtype=torch.long)
        ends = [i for i in range(1, len(paths) + 1) if i == len(paths) or len(paths[i]) > len(paths[i - 1])]
        return cls(parents, torch.tensor([path[-1] for path in paths], dtype=torch.long), (0, *ends))

    def first(self, count: int) -> Template:
        """The first nodes alone, in template order."""
        if count not in self._cuts:
            bounds = tuple(b for b in self.bounds if b < count)
            cut = Template(self.parents[:count], self.ranks[:count], (*bounds, count) if count else (0,))
            self._cuts[count] = cut
        return self._cuts[count]

    def to(self, device: torch.device) -> Template:
        """The same shape on a device."""
        return Template(self.parents.to(device), self.ranks.to(device), self.bounds)

    @cached_property
    def _cuts(self) -> dict[int, Template]:
        return {}

    @cached_property
    def tree(self) -> DraftTree:
        """The shape as a tree, whose tokens are the ranks."""
        return DraftTree(self.ranks, self.parents)
