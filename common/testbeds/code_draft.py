"""The draft model to `code_lm`: one narrow layer that reads the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.testbeds.code_lm import CodeLM


@dataclass(frozen=True)
class CodeDraft(CodeLM):
    """A tenth of the large model's work outside the tables of tokens. It learns code alone, nothing is recalled, and in
    short sequences: a draft rarely asks for more. With 64 channels, 600 steps of 4096 tokens left it behind a bigram
    model."""

    steps: int = 3000
    batch: int = 2
    rate: float = 5e-3
    lengths: tuple[int, ...] = (128,)
    stages: tuple[float, ...] = ()
    width: int = 96
    depth: int = 1
    heads: int = 6
    kv_heads: int = 3
    inner: int = 264
    recall: float = 0.0

    name: ClassVar[str] = "code_draft"
