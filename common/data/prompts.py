"""What a language model is asked to go on from: beginnings of texts, and the questions of Spec-Bench."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import problems, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CATEGORIES = ("translation", "summarization", "qa", "math_reasoning", "rag")  # Spec-Bench's others make up MT-Bench
MT_BENCH = "mt_bench"
# The words around a question in Vicuna v1.1 and later (FastChat, Apache-2.0), which Spec-Bench uses.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions. "
)


class Prompt(Protocol):
    """Something to answer in one or more turns."""

    @property
    def turns(self) -> int:
        """How often the model is asked."""

    def ids(self, answers: Sequence[str]) -> Tensor:
        """Tokens [N] of the next turn, after as many answers."""


@dataclass(frozen=True)
class Beginning:
    """The first tokens [N] of a text."""

    tokens: Tensor
    turns: int = 1

    def ids(self, answers: Sequence[str]) -> Tensor:
        return self.tokens


@dataclass(frozen=True)
class Dialogue:
    """Questions that a chat model is asked one after the other, in Vicuna's form."""

    questions: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase

    @property
    def turns(self) -> int:
        return len(self.questions)

    def ids(self, answers: Sequence[str]) -> Tensor:
        questions = [f"USER: {question} ASSISTANT:" for question in self.questions[: len(answers) + 1]]
        replies = [f" {answer.strip()}</s>" for answer in answers] + [""]
        text = VICUNA + "".join(a + b for a, b in zip(questions, replies, strict=True))
        return torch.tensor(self.tokenizer(text)["input_ids"])


def load(
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    samples: int | None = None,
    task: str | None = None,
) -> Sequence[Prompt]:
    """The prompts of a catalogue entry: all there are, or `samples` of them, spread evenly.

    Of questions, those of a `task` of Spec-Bench alone (None: all tasks); of texts, and of problems as they stand, the
    first `length` tokens.
    """
    if identity["loader"] == "problems":
        bodies = [problem.text for problem in problems.load(identity, config)]
        count = len(bodies) if samples is None else min(samples, len(bodies))
        spread = [bodies[i * len(bodies) // count] for i in range(count)]
        return [Beginning(torch.tensor(tokenizer(text)["input_ids"][:length])) for text in spread]
    if identity["loader"] != "questions":
        return [Beginning(tokens) for tokens in texts.sequences(identity, config, tokenizer, length, samples)]
    folder = config[identity["setting"]] if "setting" in identity else Path(config["assets"]) / identity["folder"]
    lines = (Path(folder) / identity["file"]).read_text(encoding="utf8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    if task is not None:
        entries = [q for q in entries if (q["category"] if q["category"] in CATEGORIES else MT_BENCH) == task]
    if not entries:
        raise PrunelabError(
            f"{identity['file']} has no question of the task '{task}'; use {MT_BENCH}, {', '.join(CATEGORIES)}"
        )
    count = len(entries) if samples is None else min(samples, len(entries))
    return [Dialogue(tuple(entries[i * len(entries) // count]["turns"]), tokenizer) for i in range(count)]
