"""Signals of one attention layer of transformers, from what its recorder holds; each does only the work it needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core import attention
from prunelab.common.core.attention_interface import Recorder
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather
from prunelab.common.tokens.adapters.passes import SUBLAYERS, Seen

ALONE = frozenset({"hidden", "queries", "keys", "values", "cls_row", "last_row", "received"})


def windowed(config: Any) -> bool:
    """Whether a decoder has layers that see a window of the text alone."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(kinds - {"full_attention"}) or (not kinds and getattr(config, "sliding_window", None) is not None)


def fixed(cache: Any) -> bool:
    """Whether a cache has one size from the start."""
    return bool(getattr(cache, "is_compileable", False))


UNSHOWN = "this method reads the model's attention, which is then not returned; leave output_attentions out"
FIXED = "tokens are pruned with a growing cache; leave cache_implementation out, or set it to 'dynamic'"


def received(recorder: Recorder, valid: Tensor | None = None) -> Tensor:
    """Attention [B, H, N] that each token receives from the valid ones."""
    batch, heads, total = recorder.shown().shape[:3]

    def rows(start: int, stop: int) -> Tensor:
        if stop - start == total:
            return recorder.weights()
        return recorder.weights(torch.arange(start, stop, device=recorder.shown().device).expand(batch, -1))

    return attention.received(rows, (batch, heads, total), valid)


def last_index(x: Tensor, valid: Tensor | None) -> Tensor:
    """[B, 1] the last of the tokens x [B, N, ...] that counts."""
    if valid is None:
        return torch.full((len(x), 1), x.shape[1] - 1, device=x.device)
    return x.shape[1] - 1 - valid.flip(1).int().argmax(1, keepdim=True)


def row(recorder: Recorder, index: Tensor) -> Tensor:
    """Attention [B, H, N] of the tokens [B, 1]."""
    return recorder.weights(index).squeeze(2)


def newest_row(recorder: Recorder) -> Tensor:
    """Attention [B, H, N] of the newest token."""
    queries = recorder.shown()
    newest = torch.full((len(queries), 1), queries.shape[2] - 1, dtype=torch.long, device=queries.device)
    return row(recorder, newest)


def first_row(recorder: Recorder) -> Tensor:
    """Attention [B, H, N] of the first token."""
    queries = recorder.shown()
    return row(recorder, torch.zeros(len(queries), 1, dtype=torch.long, device=queries.device))


def behind(visual: Tensor) -> int:
    """How many tokens stand behind the last one of visual [B, N], at most."""
    indices = torch.arange(1, visual.shape[1] + 1, device=visual.device)
    return visual.shape[1] - int((visual * indices).amax(1).min())


def text_rows(recorder: Recorder, visual: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """Attention [B, H, R, N] of the last `count` tokens, as far as they stand behind the last visual one [B, N]."""
    if not count:
        raise PrunelabError(
            "no text stands behind the visual tokens, whose attention the method reads; put the question there"
        )
    indices = torch.arange(1, visual.shape[1] + 1, device=visual.device)
    first, last = (visual * indices).amax(1, keepdim=True), last_index(visual, valid)
    rows = last - torch.arange(count - 1, -1, -1, device=visual.device)
    weights = recorder.weights(rows.clamp_min(0))
    return weights.masked_fill((rows < first)[:, None, :, None], 0)


def per_head(value: Tensor, head: int, heads: int) -> Tensor:
    """What a value projection gave, [B, N, KV * d], as [B, H, N, d], one set a query head."""
    split = value.unflatten(-1, (-1, head)).transpose(1, 2)
    return split.repeat_interleave(heads // split.shape[1], 1)


def sources(seen: Seen, recorder: Recorder, head: int, text: int = 0) -> dict[str, Callable[[], Tensor]]:
    """How each signal of a layer is computed that can be read alone; `hidden` and `values` where they were kept.
    text: how many rows `attention` has."""
    tokens = seen.tokens
    return {
        **{name: functools.partial(seen.kept.__getitem__, name) for name in {"hidden"} | SUBLAYERS},
        "values": lambda: per_head(seen.kept["values"], head, recorder.shown().shape[1]),
        "queries": recorder.shown,
        "keys": lambda: recorder.keys,
        "cls_row": lambda: first_row(recorder),
        "last_row": lambda: row(recorder, last_index(recorder.shown().transpose(1, 2), tokens.valid)),
        "received": lambda: received(recorder, tokens.valid),
        "attention": lambda: text_rows(recorder, seen.kept["visual"], tokens.valid, text),
    }


def behind_a_bypass(
    known: dict[str, Callable[[], Tensor]], recorder: Recorder, went: Gather, total: int
) -> dict[str, Callable[[], Tensor]]:
    """The signals of a layer that some of the tokens passed by, for all [B, total] of them: `went` says which the
    layer's are; what is read of the others is zero."""

    def placed(value: Tensor, *axes: int) -> Tensor:
        for axis in axes:
            index = went.index if went.valid is None else went.index.masked_fill(~went.valid, total)
            shape = [1] * value.dim()
            shape[0], shape[axis] = index.shape[0], index.shape[1]
            out = value.new_zeros(*value.shape[:axis], total + 1, *value.shape[axis + 1 :])  # padding goes beside
            value = out.scatter(axis, index.view(shape).expand_as(value), value).narrow(axis, 0, total)
        return value

    def refused() -> Tensor:
        raise PrunelabError("tokens that passed by a layer have no attention logits there; read their attention")

    axes = {"queries": (2,), "keys": (2,), "attention": (2, 3), "received": (2,)}
    results = {
        name: functools.partial(lambda read, at: placed(read(), *at), known[name], at) for name, at in axes.items()
    }
    last = functools.partial(last_index, went.index, went.valid)
    return {**results, "attention_logits": refused, "last_row": lambda: placed(row(recorder, last()), 2)}


def keeper(kept: Callable[[], Seen], name: str) -> Callable[..., None]:
    """A hook that keeps a module's output under a name."""

    def hook(module: torch.nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        kept().kept[name] = output[0] if isinstance(output, tuple) else output

    return hook
