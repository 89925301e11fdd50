"""Methods that shorten a prompt before a language model reads it, and what a language model tells them of its words."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.context import refuse_long
from prunelab.common.core.errors import PrunelabError
from prunelab.common.ranking.role import Ranker, Units

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Informed = tuple[Sequence[str], Sequence[float]]  # the pieces of a sentence, and the self-information of each in nats


class PromptShortener(Ranker[Units]):
    """Ranks the units of a text and gives back the text of those that stay."""

    @abstractmethod
    def compress(self, text: str, budget: Budget, services: Mapping[str, Any]) -> str:
        """The text without its worst units."""


def self_information(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int | None = None
) -> Callable[[str], Informed]:
    """The service `information` of a causal language model: a sentence behind the model's start token.

    longest: tokens that are read at once; what is longer is read in parts, each by itself. Without it a sentence that
    is longer than the model's context is refused.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise PrunelabError("the tokenizer has neither a start nor an end token to put before a sentence; set one")

    def information(sentence: str) -> Informed:
        ids: list[int] = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        parts = [ids[at : at + longest] for at in range(0, len(ids), longest)] if longest else [ids]
        values = [value for part in parts for value in surprise(model, start, part)]
        return [tokenizer.decode([token]) for token in ids], values

    return information


@torch.inference_mode()
def surprise(model: PreTrainedModel, start: int, ids: Sequence[int]) -> list[float]:
    """Self-information -log p in nats of tokens behind a start token."""
    read = torch.tensor([start, *ids], device=model.device)
    refuse_long(model, len(read), "a sentence")
    logs = model(read[None]).logits[0, :-1].float().log_softmax(-1)
    values: list[float] = (-logs.gather(1, read[1:, None]).squeeze(1)).tolist()
    return values
