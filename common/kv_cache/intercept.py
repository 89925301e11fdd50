"""A decoder's attention through a function of ours, beside the library's own and never instead of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi", "gpt_neox")

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, float], Tensor]
_ATTEND: WeakKeyDictionary[nn.Module, Attend] = WeakKeyDictionary()  # attention modules at work now


@cache
def implementation() -> str:
    """The name, in transformers, of the attention function that hands every call to the module's application.

    No mask function goes with it: masks are made from what the cache holds, since the library makes one for all layers.
    """
    from transformers import AttentionInterface

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any
    ) -> tuple[Tensor, None]:
        return _ATTEND[module](module, query, key, value, scaling), None

    AttentionInterface.register("prunelab_recording", attend)
    return "prunelab_recording"


def fused(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The library's own attention [B, M, H, d] under a mask [B, 1 or KV, M, N] over the module's heads."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0]


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a decoder, by layer. Raises where the family is not supported."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or not hasattr(model, "generate"):
        raise PrunelabError(
            f"{type(model).__name__} has no cache that can be pruned here; use a causal language model of the families"
            f" {', '.join(FAMILIES)}"
        )
    found = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "scaling")]
    return sorted(found, key=lambda module: module.layer_idx)  # type: ignore[arg-type,return-value]


@contextmanager
def intercepted(model: Any, attend: Attend) -> Iterator[list[nn.Module]]:
    """Send the attention of every layer through `attend` inside the block."""
    modules = attentions(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation())
    _ATTEND.update(dict.fromkeys(modules, attend))
    try:
        yield modules
    finally:
        for module in modules:
            _ATTEND.pop(module, None)
        model.set_attn_implementation(before)
