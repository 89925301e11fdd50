"""What EAGLE's drafts start from: the target's features of a text, the layer's entries of them, and a fixed tree."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunelab.common.speculative.trees import Template
from prunelab.methods.eagle.modules import Cache, DraftHead


@dataclass
class Memory:
    """The layer, the target's output layer, the fixed tree, how many candidates are taken, and what is known of a text.

    features: [r, D] of the target, of the tokens from `begin` on. cache: the layer's entries of the first `done` of
    them. length: tokens of the text when it was last drafted for.
    """

    parts: DraftHead
    output: nn.Module
    template: Template
    most: int
    levels: dict[int, list[Level]] = field(default_factory=dict)
    features: Tensor | None = None
    cache: Cache | None = None
    begin: int = 0
    done: int = 0
    length: int = 0

    def predicted(self, tokens: Tensor) -> Tensor | None:
        """The feature [1, D] of the text's last token, as the layer predicts it; None where nothing is known. Entries
        of the tokens before it are kept."""
        held = len(tokens) - 1 - self.begin
        if self.features is None or held < 1:
            return None
        done = min(self.done, held - 1)  # what drafts start from is read anew where a text did not grow
        cache = None if self.cache is None or not done else (self.cache[0][:, :done], self.cache[1][:, :done])
        positions = torch.arange(self.begin + done, self.begin + held, device=tokens.device)
        out, self.cache = self.parts(self.features[done:held], tokens[positions + 1], positions, cache=cache)
        self.done = held
        return out[-1:]

    def beyond(self, level: int, features: Tensor, tokens: Tensor, seen: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Features [k, D] behind drafts [k] of a level (from 1), which follow the features [k, D]; seen: [k, t] bool of
        the drafts each may attend to, itself included, beside the text."""
        text = seen.new_ones(len(tokens), self.done)
        positions = torch.full_like(tokens, self.begin + self.done + level - 1)
        return self.parts(features, tokens, positions, torch.cat([text, seen], 1), cache)

    def update(self, earlier: Tensor, features: Tensor) -> None:
        """Take in the target's features [A, D] of the tokens from the last of the text on, and those before them."""
        start, new = self.length - 1 - len(earlier), torch.cat([earlier, features])
        if self.features is None or not self.begin <= start <= self.begin + len(self.features):
            self.features, self.begin, self.done = new, start, 0
        else:
            self.features = torch.cat([self.features[: start - self.begin], new])
            self.done = min(self.done, start - self.begin)


@dataclass(frozen=True)
class Level:
    """A level of a tree of fixed shape. above: [n] which of the nodes looked behind on the level before is each one's
    parent. ranks: [n] which of its candidates each takes. inner: [k] which of the n have children, and are looked
    behind; seen: [k, t] which of the t nodes looked behind so far each may attend to."""

    above: Tensor
    ranks: Tensor
    inner: Tensor
    seen: Tensor


def levels_of(template: Template) -> list[Level]:
    """The levels of a fixed tree."""
    device, parents = template.parents.device, template.parents.tolist()
    opened: list[int] = []  # nodes looked behind, in order
    before, levels = [-1], []
    for low, high in zip(template.bounds[:-1], template.bounds[1:], strict=True):
        inner = [node for node in range(low, high) if node in parents]
        opened += inner
        levels.append(
            Level(
                torch.tensor([before.index(parents[node]) for node in range(low, high)], device=device),
                template.ranks[low:high],
                torch.tensor([node - low for node in inner], dtype=torch.long, device=device),
                template.tree.ancestors[inner][:, opened],
            )
        )
        before = inner
    return levels
