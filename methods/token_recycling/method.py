"""Token Recycling (Luo et al., ACL 2025): the candidates that decoding throws away are the next drafts.

A table remembers, for every token of the vocabulary, the k tokens that the model ranked highest behind it when it was
last seen. Walking the table from the last token fills a tree of fixed shape; one forward pass verifies the tree, and
its logits, of accepted and rejected nodes alike, renew the table. Nothing is trained, and the text stays the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import DraftTree

Path = tuple[int, ...]

# The released tree "2.2.2": the number of children of every node, level by level from the root. 80 nodes, 40 leaves.
PUBLISHED = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)


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
        bounds = tuple(b for b in self.bounds if b < count)
        return Template(self.parents[:count], self.ranks[:count], (*bounds, count) if count else (0,))

    @cached_property
    def tree(self) -> DraftTree:
        """The shape as a tree, whose tokens are the ranks."""
        return DraftTree(self.ranks, self.parents)


def expand(table: Tensor, root: Tensor, template: Template) -> Tensor:
    """Draft tokens [T] behind the root [1]: candidates of each node's token in the table [V, k], a gather a level."""
    ids = torch.cat([root, root.new_empty(len(template.parents))])  # [T + 1], the root first
    for start, end in pairwise(template.bounds):
        above = ids[template.parents[start:end] + 1]
        ids[start + 1 : end + 1] = table[above, template.ranks[start:end]]
    return ids[1:]


def renew(table: Tensor, tokens: Tensor, logits: Tensor) -> None:
    """Overwrite the rows of the tokens [n] in the table [V, k] with the best k of their logits [n, V]. Of a token that
    stands there more than once the last counts, on every device."""
    best = logits.topk(table.shape[1], dim=-1).indices
    again = (tokens.unsqueeze(1) == tokens.unsqueeze(0)).triu(1).any(1)
    table[tokens[~again]] = best[~again]


@dataclass
class Memory:
    """What decoding goes on from: the table [V, k] int64, and the template cut to each budget asked for."""

    table: Tensor
    template: Template
    cut: dict[int, Template] = field(default_factory=dict)

    def shape(self, count: int) -> Template:
        """The first `count` nodes of the template."""
        if count not in self.cut:
            self.cut[count] = self.template.first(count)
        return self.cut[count]


@dataclass(frozen=True)
class TokenRecycling(DraftDecoder):
    """Drafts from a table of earlier candidates.

    candidates: k, how many are remembered for a token. tree: paths of candidate ranks from the root, shorter ones
        first; empty stands for the released tree of 80 nodes. The budget takes the first nodes of it.

    The state is the table: zeros at first, so that an unknown token proposes token 0, and never reset between prompts
    (hot start).
    """

    candidates: int = 8
    tree: tuple[Path, ...] = ()

    name: ClassVar[str] = "token_recycling"

    def start(self, vocabulary: int, **services: Any) -> Memory:
        paths = tuple(map(tuple, self.tree)) or paths_of(PUBLISHED)
        most = max(map(max, paths)) + 1
        if not most <= self.candidates <= vocabulary:
            raise PrunelabError(
                f"token_recycling: the tree takes {most} candidates of a token and the model has {vocabulary} tokens;"
                f" candidates={self.candidates} must lie between"
            )
        template = Template.of(paths)
        table = torch.zeros(vocabulary, self.candidates, dtype=torch.long)
        device = table.device
        return Memory(table, Template(template.parents.to(device), template.ranks.to(device), template.bounds))

    def draft(self, state: Memory, tokens: Tensor, budget: Budget) -> DraftTree:
        template = state.shape(budget.count(len(state.template.parents)))
        return template.tree.refill(expand(state.table, tokens[-1:], template))

    def observe(self, state: Memory, step: Step) -> None:
        """All nodes renew the table, accepted or not. The prompt does not: its logits were never computed."""
        renew(state.table, step.tokens, step.logits)
