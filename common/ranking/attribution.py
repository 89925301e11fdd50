"""Context tokens ranked by what they contribute to a language model's next token: what attribution methods share.

Shape letters: B samples, T tokens, D width of the embeddings, V words of the vocabulary, L layers, H heads.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunelab.common.core.context import refuse_long
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking.role import Ranker


@dataclass(frozen=True)
class Explained:
    """A causal language model of transformers as attribution methods read it, the service `model`.

    baseline: the token that stands for no information: the unknown token, or the padding. end: the end token, which
    baselines leave as it is.
    """

    model: Any
    baseline: int = 0
    end: int | None = None

    def next_token_logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] behind contexts [B, T]."""
        refuse_long(self.model, tokens.shape[1], "the context")
        with torch.no_grad():
            logits: Tensor = self.model(tokens, use_cache=False, **self._last).logits[:, -1].float()
        return logits

    @cached_property
    def _last(self) -> dict[str, int]:
        """What asks a model for the logits of the last position alone, where it can give them."""
        return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}

    def embed(self, tokens: Tensor) -> Tensor:
        """Word embeddings [B, T, D] in float32, whatever the model's precision, so that paths between them are fine."""
        embedded: Tensor = self.model.get_input_embeddings()(tokens).detach().float()
        return embedded

    def from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Logits [B, V] behind contexts given by their word embeddings [B, T, D]; positions are added inside."""
        refuse_long(self.model, embeddings.shape[1], "the context")
        given = embeddings.to(self.model.get_input_embeddings().weight.dtype)
        logits: Tensor = self.model(inputs_embeds=given, use_cache=False, **self._last).logits[:, -1].float()
        return logits

    def positions(self, length: int) -> Tensor | float:
        """Learned embeddings [T, D] of positions that start at 0, where the model adds such; else 0."""
        table = getattr(getattr(self.model, "transformer", None), "wpe", None)
        return 0.0 if table is None else table.weight[:length].detach()

    def attentions(self, tokens: Tensor) -> Tensor:
        """Attention [L, B, H, T, T] of all layers."""
        refuse_long(self.model, tokens.shape[1], "the context")
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                result = self.model(tokens, use_cache=False, output_attentions=True).attentions
        finally:
            self.model.set_attn_implementation(before)
        return torch.stack(result)

    def without(self, tokens: Tensor) -> Tensor:
        """The context [B, T] in which every token but end tokens is the baseline's."""
        blank = torch.full_like(tokens, self.baseline)
        return blank if self.end is None else torch.where(tokens == self.end, tokens, blank)


class Attribution(Ranker[Tensor]):
    """Ranks the tokens [T] of a context by their importance for the model's likeliest next token, or for `target`."""

    role: ClassVar[str] = "ranker"

    def rank(self, units: Tensor, services: Mapping[str, Any] | None = None) -> Tensor:
        return self.importance(units, services or {})

    @abstractmethod
    def importance(self, tokens: Tensor, services: Mapping[str, Any], target: int | None = None) -> Tensor:
        """Importance [T], whose sum is 1."""


def likeliest(tokens: Tensor, logits: Any, target: int | None) -> int:
    """The token that is explained: the given one, or the likeliest of the model's next."""
    if not len(tokens):
        raise PrunelabError("there is no context to explain; give at least one token")
    return int(logits(tokens[None])[0].argmax()) if target is None else target


def alike(kinds: Sequence[int]) -> Callable[[Tensor, torch.Generator], Tensor]:
    """The service `replace` that draws uniformly among the tokens of the same kind; kinds: of all V tokens, such as
    their parts of speech (the authors' default), or one kind for all of them."""
    table = torch.tensor(kinds)
    order = table.argsort(stable=True)
    sizes = torch.bincount(table)
    starts = sizes.cumsum(0) - sizes

    def replace(tokens: Tensor, rng: torch.Generator) -> Tensor:
        kind = table[tokens.cpu()]
        place = (torch.rand(kind.shape, generator=rng) * sizes[kind]).long().minimum(sizes[kind] - 1)
        return order[starts[kind] + place].to(tokens.device)

    return replace


def kinds(tokenizer: Any, vocabulary: int) -> list[int]:
    """The kind of each of V tokens by how it is written, which stands in for parts of speech: a word, the beginning of
    one, a number, signs, blanks, or what the tokenizer has no text for."""
    words = [tokenizer.decode([token]) for token in range(min(vocabulary, len(tokenizer)))]

    def kind(word: str) -> int:
        plain = word.strip()
        if not plain:
            return 4
        begins = word[0].isspace()
        return (0 if begins else 1) if plain.isalpha() else 2 if plain.isnumeric() else 3

    return [kind(word) for word in words] + [5] * (vocabulary - len(words))
