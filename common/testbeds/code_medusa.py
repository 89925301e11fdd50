"""Medusa's heads on `code_lm`: what they guess further ahead, from the frozen model's hidden states."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import code
from prunelab.common.speculative.reader import info
from prunelab.common.testbeds.base import Testbed
from prunelab.common.testbeds.code_lm import QUICK, CodeLM
from prunelab.common.training.recipe import read_log

METHOD = "medusa"
FULL = 32


@dataclass(frozen=True)
class CodeMedusa(Testbed):
    """By the released recipe: no decay, a tenth of warm-up, the sum of the heads' losses. To stay small the heads share
    the target's output layer; they are as many as the released tree is deep.

    length: of its sequences; `batch` counts them. guesses: heads. start: sha256 of the weights of `code_lm` whose
    hidden states they read, by default those that ship; weights that were trained anew since ask for new heads.
    """

    steps: int = 3000
    batch: int = 4
    rate: float = 1e-3
    warmup: float = 0.1
    decay: float = 0.0
    length: int = 256
    guesses: int = 4
    start: str = ""

    name: ClassVar[str] = "code_medusa"
    needs: ClassVar[tuple[str, ...]] = CodeLM.needs

    def __post_init__(self) -> None:
        from prunelab.common.testbeds import SHIPPED

        if not self.start:
            object.__setattr__(self, "start", read_log(SHIPPED / CodeLM.name)["sha256"])

    def build(self) -> nn.Module:
        model, start = _target()
        if start != self.start:
            raise PrunelabError(f"{self.name} reads other weights of {CodeLM.name}; train {self.name} again")
        heads = registry.create(METHOD, heads=self.guesses, tied=True).build(info(model))
        assert heads is not None
        return heads

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        tokens = code.windows(code.stream("train", CodeLM().vocabulary), self.batch, self.length, generator)
        return _losses()(guessed(model, tokens), tokens).sum()

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        """Share of held-out tokens that each head's first guess finds, from `head_1` for the token behind the next."""
        held_out = code.stream("held_out", CodeLM().vocabulary)
        tokens = code.windows(held_out, QUICK if quick else FULL, self.length)
        best = torch.stack([guessed(model, row).argmax(-1) for row in tokens.split(1)], 1).squeeze(2)
        results = [own[:, : -2 - k] == tokens[:, 2 + k :] for k, own in enumerate(best)]
        return {f"head_{k + 1}": float(right.float().mean()) for k, right in enumerate(results)}


def guessed(heads: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [heads, B, T, V] of the heads behind tokens [B, T]; products in bfloat16."""
    model, _ = _target()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            hidden = model(tokens, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        logits: Tensor = model.get_output_embeddings()(heads(hidden))
    return logits.float()


@cache
def _target() -> tuple[Any, str]:
    """The frozen language model that ships, and the sha256 of its weights."""
    from prunelab.common import testbeds

    model, log = testbeds.load(CodeLM.name)
    return model.requires_grad_(False), log["sha256"]


def _losses() -> Callable[..., Tensor]:
    """The losses of the heads. Found by the method's name: this package knows no method."""
    module = importlib.import_module(f"prunelab.methods.{registry.slug(registry.get(METHOD))}.modules")
    return module.losses
