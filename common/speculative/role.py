"""The role of methods that draft tokens for a model to confirm."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.method import Method
from prunelab.common.speculative import trees
from prunelab.common.speculative.trees import Accepted, DraftTree


@dataclass(frozen=True)
class Step:
    """One verification, as the method that drafted for it sees it.

    root: the last token [1]. tree: the T drafts behind it. logits: [T + 1, V] of the target, row 0 behind the root.
    accepted: what they confirm. aside: [S, V] logits behind the tokens of `DraftDecoder.aside`. hidden: [T + 1, D] what
    the target's output layer made the logits of, for methods that ask for it; earlier: [M, D] the like of the M tokens
    before the root that were read with it, such as a prompt's.
    """

    root: Tensor
    tree: DraftTree
    logits: Tensor
    accepted: Accepted
    aside: Tensor | None = None
    hidden: Tensor | None = None
    earlier: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """[T + 1] the root and the drafts, one a row of the logits."""
        return torch.cat([self.root, self.tree.tokens])


class DraftDecoder(Method):
    """Drafts a tree of tokens, keeps the part the target model confirms, and learns from what it saw.

    `common.speculative` runs it on a model. A state outlives a prompt: what was learned from one serves the next.
    reads_hidden: whether `observe` needs the hidden states of the target's last layer.
    """

    role: ClassVar[str] = "draft_decoder"
    reads_hidden: ClassVar[bool] = False

    @abstractmethod
    def start(self, vocabulary: int, **services: Any) -> Any:
        """A fresh decoding state for a target of that many tokens, on the default device.

        services: by name, among them as `parts` the learned parts of a method that has some, and as `output` the
        target's output layer for one that reads hidden states.
        """

    def begin(self, state: Any, prompt: Tensor) -> None:
        """A new text begins with these tokens [N]."""

    @abstractmethod
    def draft(self, state: Any, tokens: Tensor, budget: Budget) -> DraftTree:
        """A tree that may follow the tokens [N]; the budget counts its nodes."""

    def aside(self, state: Any, tokens: Tensor) -> DraftTree | None:
        """Further tokens for the target to read behind the tokens [N] in the same pass. They are no drafts: they are
        never accepted, and no budget counts them."""
        return None

    def accept(self, tree: DraftTree, logits: Tensor, rng: torch.Generator | None = None) -> Accepted:
        """What the target's logits [T + 1, V] (row 0: behind the last accepted token) confirm: the longest greedy
        match, or with `rng` a lossless sample."""
        return trees.greedy(tree, logits) if rng is None else trees.sample(tree, logits, rng)

    def observe(self, state: Any, step: Step) -> None:
        """Learn from what the target made of the last draft."""
