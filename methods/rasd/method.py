"""RASD (Quan et al., Findings of ACL 2025): retrieved continuations join the draft model's tree.

A reconstruction: no code was released, and the full text was not at hand. What follows is what abstract and summaries
agree on (retrieve behind the current suffix, prune by the draft model's probabilities, fuse by longest prefix, verify
the fused tree in one pass); each further choice is marked. The text stays the target's in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt, Share
from prunelab.common.speculative.role import DraftDecoder
from prunelab.common.speculative.trees import EMPTY, DraftTree, fuse, trie


class DraftModel(Protocol):
    """The service `draft`, a small language model. `read` gives logits [T + 1, V] behind the tokens [N] and behind each
    node of a tree; with known > 0 those of the nodes from there on, where the first ones were read just before."""

    def read(self, tokens: Tensor, tree: DraftTree, known: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Guess:
    """What the draft model thinks: paths [C, L] of its candidates, most probable first, the tree it looked behind, and
    its probabilities [S + 1, V] there (row 0: behind the last token)."""

    paths: Tensor
    read: DraftTree
    probabilities: Tensor


def guess(draft: DraftModel, tokens: Tensor, width: int, depth: int) -> Guess:
    """A dynamic tree as in EAGLE-2: on each level the `width` likeliest nodes get `width` candidates each; nodes are
    ranked by the product of the probabilities on the way to them, shallow ones first among equals."""
    read = DraftTree(tokens[:0], tokens[:0])
    logs = [draft.read(tokens, read).float().log_softmax(-1)]
    parents, score = tokens.new_tensor([-1]), logs[0].new_zeros(1)  # nodes of `read` about to be looked behind
    paths, scores = [], []
    for level in range(depth):
        best = logs[-1].topk(min(width, logs[-1].shape[1]))
        reached = (score.unsqueeze(1) + best.values).flatten()
        above = read.paths[parents] if level else tokens.new_zeros(1, 0)
        result = torch.cat([above.repeat_interleave(best.indices.shape[1], 0), best.indices.flatten().unsqueeze(1)], 1)
        paths.append(torch.nn.functional.pad(result, (0, depth - level - 1), value=EMPTY))
        scores.append(reached)
        if level + 1 < depth:
            chosen = reached.topk(min(width, len(reached))).indices
            known = len(read.tokens)
            origin = parents.repeat_interleave(best.indices.shape[1])[chosen]
            read = DraftTree(torch.cat([read.tokens, result[chosen, level]]), torch.cat([read.parents, origin]))
            logs.append(draft.read(tokens, read, known)[-len(chosen) :].float().log_softmax(-1))
            parents, score = torch.arange(known, known + len(chosen), device=tokens.device), reached[chosen]
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    return Guess(torch.cat(paths)[order], read, torch.cat(logs).exp())


def continuations(store: Tensor, tokens: Tensor, longest: int, length: int, most: int) -> Tensor:
    """What follows in the store [M] where it holds the end of the tokens [N]: the last `most` places, [C, length],
    EMPTY behind the end of the store. Suffixes are tried from `longest` tokens down to one, until one is found."""
    for size in range(min(longest, len(tokens), len(store)), 0, -1):
        places = (store.unfold(0, size, 1) == tokens[-size:]).all(1).nonzero().squeeze(1) + size
        places = places[places < len(store)][-most:]
        if len(places):
            index = places.unsqueeze(1) + torch.arange(length, device=store.device)
            return store[index.clamp(max=len(store) - 1)].masked_fill(index >= len(store), EMPTY)
    return store.new_full((0, length), EMPTY)


def prune(tree: DraftTree, seen: Guess, least: float) -> Tensor:
    """Nodes [T] bool of a retrieval tree that the draft model does not rule out.

    assumption: a node goes, with all below it, where the draft model looked behind its parent and gave its token less
    than `least`. What the draft model has not looked at stays: it has no probability, and none is made up.
    """
    ways = torch.cat([seen.read.tokens[:0].new_full((1, seen.read.paths.shape[1]), EMPTY), seen.read.paths])
    above = torch.where(tree.parents.unsqueeze(1) >= 0, tree.paths[tree.parents], EMPTY)
    depth = max(ways.shape[1], above.shape[1])
    ways, above = (torch.nn.functional.pad(p, (0, depth - p.shape[1]), value=EMPTY) for p in (ways, above))
    shared = (above.unsqueeze(1) == ways.unsqueeze(0)).all(-1)  # [T, S + 1]
    chance = seen.probabilities[shared.long().argmax(1), tree.tokens]
    likely = (chance >= least) | ~shared.any(1)
    return (likely | ~tree.ancestors).all(1)


def frequent(tree: DraftTree, through: Tensor, count: int) -> Tensor:
    """The `count` nodes [T] bool that most retrieved paths [T] go through, shallow ones first among equals."""
    rank = through * (int(tree.depths.max()) + 1) - tree.depths
    kept = torch.zeros_like(rank, dtype=torch.bool)
    kept[rank.sort(descending=True, stable=True).indices[:count]] = True
    return kept


@dataclass
class Memory:
    """The draft model and, for retrieval from a store, its tokens [M]."""

    draft: DraftModel
    store: Tensor | None


@dataclass(frozen=True)
class RASD(DraftDecoder):
    """Fuses a draft model's tree with retrieved continuations (arXiv 2503.03434).

    Parameters
    ----------
    retrieval : {"context", "store"}
        From the text so far (prompt lookup), or from a store of tokens, the service of that name (REST).
    nodes : int
        Of the draft model's tree.
    retrieved : int
        Nodes that retrieval may add; the budget scales both.
    width, depth : int
        Of the draft model's tree.
    longest : int
        Tokens of a suffix.
    length : int
        Tokens of a continuation.
    most : int
        Continuations looked at.
    least : float
        Probability under the draft model that a retrieved token needs; 0 prunes nothing.
    """

    # assumption: all of these sizes; those of the tree are EAGLE-2's, made smaller.
    retrieval: Literal["context", "store"] = "context"
    nodes: NonNegativeInt = 40
    retrieved: NonNegativeInt = 20
    width: PositiveInt = 6
    depth: PositiveInt = 5
    longest: PositiveInt = 3
    length: PositiveInt = 10
    most: PositiveInt = 64
    least: Share = 0.01

    name: ClassVar[str] = "rasd"
    services = ("draft",)

    def start(self, vocabulary: int, **services: Any) -> Memory:
        if self.retrieval == "store" and "store" not in services:
            raise PrunelabError(
                "rasd retrieves from a store; pass its tokens as services={'store': ...}, or use context"
            )
        return Memory(services["draft"], services.get("store"))

    def draft(self, state: Memory, tokens: Tensor, budget: Budget) -> DraftTree:
        total = budget.count(self.nodes + self.retrieved)
        share = total * self.retrieved // (self.nodes + self.retrieved)
        seen = guess(state.draft, tokens, self.width, self.depth)
        own, _ = trie(seen.paths[: total - share])  # with a node its parent, which ranks before it
        store = tokens if self.retrieval == "context" or state.store is None else state.store.to(tokens.device)
        result, through = trie(continuations(store, tokens, self.longest, self.length, self.most))
        if not len(result.tokens):
            return own
        kept = prune(result, seen, self.least)
        result, through = result.where(kept), through[kept]
        return fuse(own, result.where(frequent(result, through, share))) if len(result.tokens) else own
