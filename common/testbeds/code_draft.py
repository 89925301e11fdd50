"""The draft model to `code_lm`: one narrow layer that reads the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunelab.common.testbeds.code_lm import CodeLM


@dataclass(frozen=True)
class CodeDraft(CodeLM):
    """A tenth of the large model's work outside the tables of tokens. It learns code alone, in short sequences, as its
    prompts are short; nothing is recalled."""

    steps: int = 3000
    batch: int = 8
    rate: float = 5e-3
    context: int = 256
    lengths: tuple[int, ...] = (128, 256)
    stages: tuple[float, ...] = (0.7,)
    width: int = 96
    depth: int = 1
    heads: int = 6
    kv_heads: int = 3
    inner: int = 264
    recall: float = 0.0

    name: ClassVar[str] = "code_draft"
