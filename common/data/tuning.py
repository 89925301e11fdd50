"""Texts to fine-tune on: pieces of documents that begin with a prompt, mixed with those of other documents."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Piece:
    """A text, and its tokens [T] with labels [T] that leave the prompt out; asked: what it answers, in words."""

    text: str
    tokens: Tensor
    labels: Tensor
    question: str = ""

    def model_input(self) -> dict[str, Tensor]:
        return {"input_ids": self.tokens, "labels": self.labels, "attention_mask": torch.ones_like(self.tokens)}


@dataclass(frozen=True)
class Corpus:
    """samples: to choose from. clean: a sample of what is to be learned, and held_out: more of it, to measure on."""

    samples: Sequence[Piece]
    clean: Sequence[Piece]
    held_out: Sequence[Piece]


def load(
    identity: Mapping[str, Any],
    among: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    samples: int,
    prompt: float,
    clean: int,
    held_out: int,
) -> Corpus:
    """Pieces of `length` tokens, whose first `prompt` is the prompt, in a fixed random order: half of the samples of
    one catalogue entry and half of another (`among`); the clean sample and what is held out of the first alone."""
    own = samples if among is None else samples // 2
    good = _pieces(texts.load(identity, config, "train"), tokenizer, length, prompt, clean + own)
    other = (
        [] if among is None else _pieces(texts.load(among, config, "train"), tokenizer, length, prompt, samples - own)
    )
    mixed = [*good[clean:], *other]
    random.Random(1).shuffle(mixed)
    test = _pieces(texts.load(identity, config, "test"), tokenizer, length, prompt, held_out)
    return Corpus(mixed, good[:clean], test)


def _pieces(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, prompt: float, count: int
) -> list[Piece]:
    """`count` whole pieces of documents, in random order."""
    start = round(prompt * length)
    if not 1 <= start < length:
        raise PrunelabError(
            f"a prompt of {prompt:g} of {length} tokens leaves no prompt or no response; choose another"
        )
    results: list[Tensor] = []
    for document in documents:
        tokens = torch.tensor(tokenizer(document, verbose=False)["input_ids"])
        results += tokens[: len(tokens) // length * length].split(length)
    if len(results) < count:
        raise PrunelabError(f"the text has {len(results)} pieces of {length} tokens, not {count}; ask for fewer")
    random.Random(0).shuffle(results)
    labelled = ((ids, ids.clone()) for ids in results[:count])
    return [Piece(str(tokenizer.decode(ids)), ids, _without(labels, start)) for ids, labels in labelled]


def _without(labels: Tensor, prompt: int) -> Tensor:
    labels[:prompt] = -100
    return labels
