"""Token Recycling (Luo et al., ACL 2025): the candidates that decoding throws away are the next drafts.

A table remembers, for every token of the vocabulary, the k tokens that the model ranked highest behind it when it was
last seen. Walking the table from the last token fills a tree of fixed shape; one forward pass verifies the tree, and
its logits, of accepted and rejected nodes alike, renew the table. Nothing is trained, and the text stays the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import PositiveInt
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import DraftTree, Path, Template, paths_of

# The released tree "2.2.2": the number of children of every node, level by level from the root. 80 nodes, 40 leaves.
PUBLISHED = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
)


def expand(table: Tensor, root: Tensor, template: Template) -> Tensor:
    """Draft tokens [T] behind the root [1]: candidates of each node's token in the table [V, k], a gather a level."""
    ids = torch.cat([root, root.new_empty(len(template.parents))])  # [T + 1], the root first
    parents = template.parents + 1
    for start, end in pairwise(template.bounds):
        above = ids.index_select(0, parents[start:end])
        ids[start + 1 : end + 1] = table.take(above * table.shape[1] + template.ranks[start:end])
    return ids[1:]


def renew(table: Tensor, tokens: Tensor, logits: Tensor) -> None:
    """Overwrite the rows of the tokens [n] in the table [V, k] with the best k of their logits [n, V]. Of a token that
    stands there more than once the last counts, on every device."""
    best = logits.topk(table.shape[1], dim=-1).indices
    order = torch.arange(len(tokens), device=tokens.device)
    last = ((tokens.unsqueeze(1) == tokens) * order).amax(1)  # where each token stands for the last time
    table.index_copy_(0, tokens, best.index_select(0, last))


@dataclass
class Memory:
    """What decoding goes on from: the table [V, k] int64, and the shape of the trees."""

    table: Tensor
    template: Template


@dataclass(frozen=True)
class TokenRecycling(DraftDecoder):
    """Drafts from a table of earlier candidates (arXiv 2408.08696).

    The budget takes the first nodes of the tree. The state is the table: zeros at first, so that an unknown token
    proposes token 0, and never reset between prompts (hot start).

    Parameters
    ----------
    candidates : int
        k, how many are remembered for a token.
    tree : tuple of paths
        Paths of candidate ranks from the root, shorter ones first; empty stands for the released tree of 80 nodes.
    """

    candidates: PositiveInt = 8
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
        return Memory(table, template.to(table.device))

    def draft(self, state: Memory, tokens: Tensor, budget: Budget) -> DraftTree:
        template = state.template.first(budget.count(len(state.template.parents)))
        return template.tree.refill(expand(state.table, tokens[-1:], template))

    def observe(self, state: Memory, step: Step) -> None:
        """All nodes renew the table, accepted or not. The prompt does not: its logits were never computed."""
        renew(state.table, step.tokens, step.logits)
