"""Decoding as transformers does it by itself, timed and counted as the methods are: token by token, with prompt lookup,
and with a small draft model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunelab.common.core.errors import PrunelabError
from prunelab.common.speculative.loop import Decoded, clock, prompt
from prunelab.common.speculative.reader import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain(model: PreTrainedModel, ids: Tensor, *, max_new_tokens: int, **options: Any) -> Decoded:
    """One token a forward pass."""
    return _run(model, ids, {"max_new_tokens": max_new_tokens, **options})


def prompt_lookup(
    model: PreTrainedModel, ids: Tensor, *, max_new_tokens: int, tokens: int = 10, ngram: int = 3, **options: Any
) -> Decoded:
    """Drafts of up to `tokens` tokens, copied from behind an earlier place in the text that ends with the same `ngram`
    tokens, or fewer."""
    lookup = {"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": ngram}
    return _run(model, ids, {"max_new_tokens": max_new_tokens, **lookup, **options})


def assistant(
    model: PreTrainedModel, ids: Tensor, *, max_new_tokens: int, draft: PreTrainedModel, **options: Any
) -> Decoded:
    """Drafts by a small model with the target's tokens, as many as transformers' defaults make it."""
    words, others = vocabulary(model), vocabulary(draft)
    if words != others:
        raise PrunelabError(
            f"the draft model has {others} tokens and the target {words}; take one with the target's tokenizer"
        )
    with _timed(draft) as drafting:
        done = _run(model, ids, {"max_new_tokens": max_new_tokens, "assistant_model": draft, **options})
    return Decoded(done.tokens, done.steps, done.seconds, drafting.seconds)


@dataclass
class _Calls:
    count: int = 0
    seconds: float = 0.0
    start: float = 0.0


@contextmanager
def _timed(model: PreTrainedModel) -> Iterator[_Calls]:
    """Counts the forward passes of its body and their seconds."""
    calls = _Calls()

    def before(*_: Any) -> None:
        calls.start = clock(model.device)

    def after(*_: Any) -> None:
        calls.count += 1
        calls.seconds += clock(model.device) - calls.start

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: PreTrainedModel, ids: Tensor, options: dict[str, Any]) -> Decoded:
    ids = prompt(model, ids)
    with _timed(model) as calls:
        start = clock(model.device)
        out = model.generate(ids, **{"do_sample": False, **options})
        seconds = clock(model.device) - start
    return Decoded(out[0, ids.shape[1] :], calls.count, seconds)
