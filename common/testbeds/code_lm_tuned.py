"""The language model of Python source, fine-tuned on another language of the same words (`common.data.texts.dialect`):
what methods that prune the changes of a fine-tuning are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import code, texts
from prunelab.common.testbeds.base import Testbed
from prunelab.common.testbeds.code_lm import QUICK, TOKENIZER, CodeLM
from prunelab.common.training.recipe import read_extra, read_log

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES: dict[code.Split, int] = {"train": 300, "held_out": 60}


@dataclass(frozen=True)
class CodeLMTuned(Testbed):
    """Goes on from the shipped weights of `code_lm`, whose tokenizer it keeps.

    start: sha256 of the weights it starts from, by default those that ship; weights that were trained anew since ask
    for a new fine-tuning. length: of its sequences; `batch` counts them.
    """

    steps: int = 300
    batch: int = 8
    rate: float = 5e-4
    decay: float = 0.0
    length: int = 512
    start: str = ""

    name: ClassVar[str] = "code_lm_tuned"
    needs: ClassVar[tuple[str, ...]] = CodeLM.needs

    def __post_init__(self) -> None:
        if not self.start:
            from prunelab.common.testbeds import SHIPPED

            object.__setattr__(self, "start", read_log(SHIPPED / CodeLM.name)["sha256"])

    def build(self) -> nn.Module:
        from prunelab.common import testbeds

        model, log = testbeds.load(CodeLM.name)
        if log["sha256"] != self.start:
            raise PrunelabError(f"{self.name} started from other weights of {CodeLM.name}; train {self.name} again")
        return model

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        tokens = code.windows(self.stream("train"), self.batch, self.length, generator)
        return CodeLM().surprise(model, tokens).mean()

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Perplexity and share of next tokens right on held-out files of both languages: the new one, and as
        `before_...` the one that the base model speaks."""
        results: dict[str, float] = {}
        for prefix, stream in (("", self.stream("held_out")), ("before_", self.stream("held_out", False))):
            tokens = code.windows(stream, QUICK if quick else 4 * QUICK, self.length)
            logits = model(tokens, use_cache=False).logits[:, :-1]
            nll = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
            results[f"{prefix}perplexity"] = float(nll.exp())
            results[f"{prefix}accuracy"] = float((logits.argmax(-1) == tokens[:, 1:]).float().mean())
        return results

    def extras(self) -> dict[str, str]:
        return {TOKENIZER: self.tokenizer.to_str(pretty=False)}

    def stream(self, split: code.Split, changed: bool = True) -> Tensor:
        """Some files of a split as one stream of tokens [n] int32, in the new language or as they are."""
        if (split, changed) not in self._streams:
            files = code.files(split)[: FILES[split]]
            read = map(texts.dialect, files) if changed else files
            self._streams[split, changed] = code.encode(read, self.tokenizer)
        return self._streams[split, changed]

    @cached_property
    def _streams(self) -> dict[tuple[str, bool], Tensor]:
        return {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that ships with the base model."""
        from tokenizers import Tokenizer

        from prunelab.common.testbeds import SHIPPED

        return Tokenizer.from_str(read_extra(SHIPPED / CodeLM.name, TOKENIZER))
