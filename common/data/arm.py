"""A small simulated arm over a table of handwritten digits (`prunelab.common.data.pictures`).

The gripper hangs over one of the 9 x 9 cells of a picture, where it shows as a white frame. It is told to take a digit.
An action is two tokens, the row and the column to go to, of which a control step comes one cell nearer along either
axis. Where it arrives it closes: over one of the four cells of the digit it has taken that one, and another instruction
follows until all are taken; elsewhere the episode has failed.

Why this tells pruning methods apart: where to go is in the four tokens of a digit that the instruction names, at every
control step again, and what stands still in the picture repeats from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunelab.common.data import digits, questions
from prunelab.common.data.pictures import CELL, NONE, PICTURE, Pictures, pictures
from prunelab.common.data.questions import DIGITS, IDS, ids

INSTRUCTION = "where is the digit {}"
SIDE = PICTURE
WORDS = (DIGITS[:SIDE], DIGITS[:SIDE])  # of each token of an action, by its bin
TOKENS = len(WORDS)


@dataclass
class Table:
    """B episodes. pixels: [B, 3, 36, 36] float32 without the gripper. target: [B, G] int64, the digits to take in their
    order; corner: [B, G, 2] row and column of the upper left cell of each. gripper: [B, 2] the cell it is over. taken:
    [B] how many it has taken; failed: [B] whether it closed elsewhere."""

    pixels: Tensor
    target: Tensor
    corner: Tensor
    gripper: Tensor
    taken: Tensor
    failed: Tensor

    @property
    def done(self) -> Tensor:
        """[B] whether an episode is over."""
        return self.failed | (self.taken == self.target.shape[1])

    def now(self) -> tuple[Tensor, Tensor]:
        """The digit [B] to be taken next and its corner [B, 2]; the last ones where all are taken."""
        turn = self.taken.clamp(max=self.target.shape[1] - 1)
        row = torch.arange(len(turn))
        return self.target[row, turn], self.corner[row, turn]

    def seen(self) -> dict[str, Tensor]:
        """What a policy is given: `input_ids` and `attention_mask` [B, N], all of one length, and `pixel_values`."""
        digit, _ = self.now()
        prompt = questions.prompt("picture", instruction(digit))
        pixels = with_gripper(self.pixels, self.gripper)
        return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": pixels}

    def step(self, action: Tensor) -> None:
        """Carry actions [B, 2] out, as bins, -1 where a token is none of an action and nothing moves along that axis;
        episodes that are over stay as they are."""
        over = self.done
        _, corner = self.now()
        move = (action - self.gripper).sign() * (action >= 0)
        self.gripper = torch.where(over.unsqueeze(1), self.gripper, self.gripper + move)
        closed = (self.gripper == action).all(1) & ~over
        there = within(self.gripper, corner)
        self.taken = self.taken + (closed & there)
        self.failed = self.failed | (closed & ~there)


def tables(split: digits.Split, count: int, generator: torch.Generator, goals: int = 2) -> Table:
    """So many episodes of digits of a split, each with `goals` digits to take, of which there is one each, in an order
    by lot, and the gripper anywhere."""
    kept: list[Table] = []
    while sum(len(table.taken) for table in kept) < count:
        facts = pictures(split, count, generator)
        single, corner = lone(facts), corners(facts)
        enough = single.sum(1) >= goals
        order = (torch.rand(single.shape, generator=generator) + single).argsort(1, descending=True)[:, :goals]
        gripper = torch.randint(SIDE, (count, 2), generator=generator)
        made = (
            facts.pixels, facts.digit.gather(1, order), corner[torch.arange(count).unsqueeze(1), order], gripper,
            torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool),
        )  # fmt: skip
        kept.append(Table(*(part[enough] for part in made)))
    parts = ("pixels", "target", "corner", "gripper", "taken", "failed")
    return Table(*(torch.cat([getattr(table, part) for table in kept])[:count] for part in parts))


def play(
    policy: Callable[[dict[str, Tensor]], Tensor],
    table: Table,
    horizon: int,
    watched: Callable[[int], Callable[[], None]] = lambda active: lambda: None,
) -> Tensor:
    """Let a policy, which writes tokens [B, 2] for what it is given, act until all episodes are over, for `horizon`
    control steps at most. Returns the steps [B] of each episode; the table is left as it then is.

    watched: called before every step with the number of episodes that are not over; what it returns, behind it.
    """
    steps = torch.zeros(len(table.taken), dtype=torch.long)
    for _ in range(horizon):
        active = ~table.done
        if not bool(active.any()):
            break
        done = watched(int(active.sum()))
        action = read(policy(table.seen()).cpu())
        done()
        table.step(action)
        steps += active
    return steps


@torch.inference_mode()
def written_by(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """The tokens [B, 2] of the action that a model writes behind its prompts, each the likeliest."""
    device = next(model.parameters()).device
    shown = {name: value.to(device) for name, value in given.items()}
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": TOKENS}
    tokens: Tensor = model.generate(**shown, **options)
    return tokens[:, given["input_ids"].shape[1] :]


def expert(corner: Tensor) -> Tensor:
    """The scripted expert's actions [..., 2], as bins, for the corner of the digit to be taken [..., 2]: to there."""
    return corner


def within(gripper: Tensor, corner: Tensor) -> Tensor:
    """Whether a cell [..., 2] is one of the four of the digit at a corner [..., 2]."""
    away = gripper - corner
    return ((away >= 0) & (away <= 1)).all(-1)


def lone(facts: Pictures) -> Tensor:
    """[B, 9] the zones that hold a digit of which there is no other."""
    same = (facts.digit.unsqueeze(2) == facts.digit.unsqueeze(1)).sum(2)
    return (facts.digit != NONE) & (same == 1)


def corners(facts: Pictures) -> Tensor:
    """[B, 9, 2] row and column of the upper left cell of each zone's digit; zeros where there is none."""
    first = (facts.owner.unsqueeze(1) == torch.arange(facts.digit.shape[1]).view(1, -1, 1)).int().argmax(2)
    return torch.stack([first // SIDE, first % SIDE], -1)


def with_gripper(pixels: Tensor, gripper: Tensor) -> Tensor:
    """Pictures [B, 3, 36, 36] with the gripper over cells [B, 2]: a white frame, within which what is below shows."""
    cells = pixels.unflatten(-1, (SIDE, CELL)).unflatten(-3, (SIDE, CELL)).clone()  # [B, 3, row, 4, column, 4]
    frame = torch.ones(CELL, CELL, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    row = torch.arange(len(pixels))
    own = cells[row, :, gripper[:, 0], :, gripper[:, 1]]  # [B, 3, 4, 4]
    cells[row, :, gripper[:, 0], :, gripper[:, 1]] = own.masked_fill(frame, (1 - digits.SHIFT) / digits.SCALE)
    return cells.flatten(-4, -3).flatten(-2)


def instruction(digit: Tensor) -> Tensor:
    """The words [..., 5] that tell to take a digit [...]."""
    words = ids(INSTRUCTION.format(questions.PAD).split()).repeat(*digit.shape, 1)
    return torch.where(words == IDS[questions.PAD], ids(DIGITS)[digit].unsqueeze(-1), words)


def written(action: Tensor) -> Tensor:
    """The tokens [..., 2] of actions, by their bins [..., 2]."""
    return torch.stack([ids(words)[action[..., i]] for i, words in enumerate(WORDS)], -1)


def read(tokens: Tensor) -> Tensor:
    """The bins [..., 2] of an action's tokens, -1 for a word that is none of an action's."""
    parts = []
    for i, words in enumerate(WORDS):
        same = tokens[..., i, None] == ids(words).to(tokens.device)
        parts.append(torch.where(same.any(-1), same.int().argmax(-1), NONE))
    return torch.stack(parts, -1)
