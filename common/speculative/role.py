"""The role of methods that draft tokens for a model to confirm."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method
from prunelab.common.speculative import trees
from prunelab.common.speculative.trees import Accepted, DraftTree


class DraftDecoder(Method):
    """Drafts a tree of tokens, keeps the part the target model confirms, and learns from what it saw.

    `common.speculative` runs it on a model. A state outlives a prompt: what was learned from one serves the next.
    """

    role: ClassVar[str] = "draft_decoder"

    @abstractmethod
    def start(self, vocabulary: int, **services: Any) -> Any:
        """A fresh decoding state for a target of that many tokens, on the default device; `services` by name."""

    @abstractmethod
    def draft(self, state: Any, tokens: Tensor, budget: Budget) -> DraftTree:
        """A tree that may follow the tokens [N]; the budget counts its nodes."""

    def accept(self, tree: DraftTree, logits: Tensor, rng: torch.Generator | None = None) -> Accepted:
        """What the target's logits [T + 1, V] (row 0: behind the last accepted token) confirm: the longest greedy
        match, or with `rng` a lossless sample."""
        return trees.greedy(tree, logits) if rng is None else trees.sample(tree, logits, rng)

    def observe(self, state: Any, tokens: Tensor, logits: Tensor) -> None:
        """Learn from tokens [T] and the logits [T, V] that followed them."""
