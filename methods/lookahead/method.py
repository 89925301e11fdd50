"""Lookahead decoding (Fu et al., ICML 2024, arXiv 2402.02057): a window of guessed future tokens makes the drafts.

Several future places are guessed at once and refined by Jacobi iteration: each forward pass answers every guess with
the model's own next token. The diagonals of the last N - 1 iterations are n-grams; a pool remembers them by the token
before them, and those of the current token are verified in the very pass that refines the window. Nothing is trained,
and the text stays the model's.

Shape letters: N tokens of an n-gram with its key, W columns of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import NonNegativeInt, PositiveInt
from prunelab.common.speculative.role import DraftDecoder, Step
from prunelab.common.speculative.trees import DraftTree

Gram = tuple[int, ...]


@dataclass
class Pool:
    """N-grams [N - 1] by the token before them, the oldest first; of one token the last `most` stay.

    It lives on the host: a step touches W entries, and reads the device once.
    """

    most: int
    grams: dict[int, dict[Gram, None]] = field(default_factory=dict)

    def add(self, key: int, gram: Sequence[int]) -> None:
        """Remember an n-gram; one that is known becomes the newest."""
        known = self.grams.setdefault(key, {})
        known.pop(tuple(gram), None)
        known[tuple(gram)] = None
        if len(known) > self.most:
            del known[next(iter(known))]

    def add_text(self, tokens: Sequence[int], size: int) -> None:
        """All n-grams of `size` tokens, key included, in a text."""
        for start in range(len(tokens) - size + 1):
            self.add(tokens[start], tokens[start + 1 : start + size])

    def behind(self, key: int) -> list[Gram]:
        """The n-grams behind a token, the oldest first."""
        return list(self.grams.get(key, ()))


def window(levels: Sequence[Tensor]) -> DraftTree:
    """The window behind the current token: each entry with all that it may see as its ancestors.

    levels: tokens of N - 1 iterations, oldest first; the oldest has a token less than the others, which are aligned so
    that their columns are diagonals. The oldest level is a chain. Entry j of the next hangs behind j tokens of that
    chain, and of every later one behind entry j of the level before.
    """
    sizes = [len(level) for level in levels]
    device, bounds = levels[0].device, [sum(sizes[:i]) for i in range(len(sizes))]
    above = [torch.arange(size, device=device) - 1 for size in sizes[:2]]
    above += [bound + torch.arange(size, device=device) for bound, size in zip(bounds[1:], sizes[2:])]
    return DraftTree(torch.cat(list(levels)), torch.cat(above))


def refine(levels: Sequence[Tensor], new: Tensor, full: int) -> list[Tensor]:
    """The window of the next pass, when the model has answered the entries of the last level with `new`. A window of
    fewer than `full` levels grows; either way it moves on by one token, however many were accepted (released)."""
    if len(levels) < full:
        return [*(level[1:] for level in levels), new if len(levels) == 1 else new[1:]]
    return [levels[1][1:], *levels[2:], new]


def diagonals(root: Tensor, levels: Sequence[Tensor], new: Tensor) -> list[list[int]]:
    """N-grams [W, N] of a full window behind the root [1] and of the answers `new` [W]: a key, which is the root or a
    token of the oldest level, and the column behind it."""
    grid: list[list[int]] = torch.stack([torch.cat([root, levels[0]]), *levels[1:], new], 1).tolist()
    return grid


@dataclass
class Memory:
    """The pool, the window's levels, and with a pool from the prompt the last N - 1 tokens of the text."""

    pool: Pool
    levels: list[Tensor] = field(default_factory=list)
    recent: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Lookahead(DraftDecoder):
    """Lookahead decoding (arXiv 2402.02057), greedy as released.

    The budget counts verified tokens, whole n-grams first, and of many the newest; the window is read aside. Window and
    pool begin anew with every text.

    Parameters
    ----------
    level : int
        N, length of the n-grams with the token that they are remembered by. N - 2 passes without drafts fill the
        window.
    window : int
        W, future places that are guessed.
    guesses : int
        G, n-grams that are remembered behind a token, and verified.
    bonus : bool
        Whether an n-gram that is confirmed to its end also gives the model's next token, N tokens in all. The release
        stops at N - 1, so that its last token is never worth reading, and is not read here.
    prompt_pool : bool
        Whether n-grams of the prompt and of the text enter the pool, too.
    seed : int
        Of the tokens of the prompt that the window starts with.
    """

    level: PositiveInt = 5
    window: PositiveInt = 7
    guesses: NonNegativeInt = 7
    bonus: bool = False
    prompt_pool: bool = False
    seed: NonNegativeInt = 0

    name: ClassVar[str] = "lookahead"

    def start(self, vocabulary: int, **services: Any) -> Memory:
        if self.level < 3 or self.window < 1 or self.guesses < 1:
            raise PrunelabError(
                f"lookahead needs n-grams of 3 tokens and a window and a guess of 1 at least, not level={self.level},"
                f" window={self.window}, guesses={self.guesses}"
            )
        return Memory(Pool(self.guesses))

    def begin(self, state: Memory, prompt: Tensor) -> None:
        draws = torch.Generator().manual_seed(self.seed)
        indices = torch.randint(len(prompt), (self.window + self.level - 3,), generator=draws)
        state.pool, state.levels, state.recent = Pool(self.guesses), [prompt[indices.to(prompt.device)]], []
        if self.prompt_pool:
            text = prompt.tolist()
            state.pool.add_text(text, self.level)
            state.recent = text[-(self.level - 1) :]

    def draft(self, state: Memory, tokens: Tensor, budget: Budget) -> DraftTree:
        length = self.level - 1 if self.bonus else self.level - 2
        full = len(state.levels) == self.level - 1
        count = budget.count(self.guesses * length) if full else 0
        newest = -(-count // length)
        grams = state.pool.behind(int(tokens[-1]))[-newest:] if newest else []
        drafts = tokens.new_tensor([gram[:length] for gram in grams]).flatten().long()[:count]
        place = torch.arange(len(drafts), device=tokens.device)
        return DraftTree(drafts, torch.where(place % length == 0, -1, place - 1))

    def aside(self, state: Memory, tokens: Tensor) -> DraftTree:
        return window(state.levels)

    def observe(self, state: Memory, step: Step) -> None:
        if step.aside is None or not len(step.aside):  # a prompt that is pruned is read alone
            return
        new = step.aside[-len(state.levels[-1]) :].argmax(-1)
        if len(state.levels) == self.level - 1:
            for key, *gram in diagonals(step.root, state.levels, new):
                state.pool.add(key, gram)
        state.levels = refine(state.levels, new, self.level - 1)
        if self.prompt_pool:
            text = state.recent + step.accepted.tokens.tolist()
            state.pool.add_text(text, self.level)
            state.recent = text[-(self.level - 1) :]
