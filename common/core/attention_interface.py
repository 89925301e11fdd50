"""Queries and keys of single attention layers of transformers' models, read beside the fused kernel.

transformers hands every attention layer's queries, keys and mask to a registered function. Ours passes them to the
stock SDPA and leaves them, as they are and uncopied, with the recorder of that layer; rows of attention are computed
from them only when a method reads them. It never runs eager attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunelab.common.core import attention
from prunelab.common.core.errors import PrunelabError

NAME = "recording_sdpa"
_RECORDERS: WeakKeyDictionary[nn.Module, Recorder] = WeakKeyDictionary()


class Recorder:
    """What one attention layer last worked on: queries [B, H, N, d], keys [B, H, M, d] (grouped ones repeated)."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.clear()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.queries: Tensor | None = None
        self._keys: Tensor | None = None
        self.mask: Tensor | None = None
        self.scale = 1.0

    def see(self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float | None) -> None:
        """Called by the attention function."""
        self.queries, self._keys, self.mask = queries, keys, mask
        self.scale = queries.shape[-1] ** -0.5 if scale is None else scale

    def shown(self) -> Tensor:
        """The queries [B, H, N, d] of the last forward pass."""
        if self.queries is None:
            raise PrunelabError(
                "no attention was recorded for this input; give the model pixels, not features computed before"
            )
        return self.queries

    @property
    def keys(self) -> Tensor:
        """[B, H, M, d], one set a query head."""
        queries = self.shown()
        assert self._keys is not None
        return self._keys.repeat_interleave(queries.shape[1] // self._keys.shape[1], 1)

    def _visible(self, rows: Tensor | None) -> Tensor | None:
        """Which keys the query rows [B, R] (None: all) see, as logit offsets [B or 1, 1, R, M], from the mask that the
        layer was given."""
        queries, mask = self.shown(), self.mask
        if mask is None:
            count = queries.shape[2]
            if not self.causal or count == 1:
                return None
            places = torch.arange(count, device=queries.device)
            mask = places <= (places.view(1, 1, -1, 1) if rows is None else rows[:, None, :, None])
        elif rows is not None:
            mask = mask.expand(rows.shape[0], *mask.shape[1:])
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        if mask.dtype == torch.bool:
            mask = mask | ~mask.any(-1, keepdim=True)  # a padding row that sees nothing would be NaN
            mask = torch.zeros_like(mask, dtype=queries.dtype).masked_fill(~mask, float("-inf"))
        return mask

    def logits(self, rows: Tensor | None = None) -> Tensor:
        """Scaled and masked attention logits [B, H, R, M] of the query rows [B, R], or of all."""
        queries = self.shown()
        assert self._keys is not None
        if rows is not None:
            index = rows[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
            queries = queries.gather(2, index)
        heads, groups = queries.shape[1], self._keys.shape[1]
        grouped = queries.unflatten(1, (groups, heads // groups)).flatten(2, 3)  # query heads that share keys together
        out = attention.logits(grouped, self._keys, self.scale).unflatten(2, (heads // groups, -1)).flatten(1, 2)
        visible = self._visible(rows)
        return out if visible is None else out + visible

    def weights(self, rows: Tensor | None = None) -> Tensor:
        """Attention [B, H, R, M] of the query rows [B, R], or of all, in float32 as the eager implementation has it."""
        return self.logits(rows).float().softmax(-1).to(self.shown().dtype)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def recording(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        recorder = _RECORDERS.get(module)
        if recorder is not None:
            recorder.see(query, key, attention_mask, options.get("scaling"))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(NAME, recording)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it padded batches would run unmasked


def record(layer: Any) -> tuple[Recorder, Callable[[], Any]]:
    """Records one attention layer until the returned function is called. Its whole backbone runs SDPA meanwhile."""
    _register()
    config, before = layer.config, layer.config._attn_implementation
    if layer in _RECORDERS:
        raise PrunelabError("this attention layer is being recorded already; leave that `with` block first")
    recorder = _RECORDERS[layer] = Recorder(bool(getattr(layer, "is_causal", True)))
    config._attn_implementation = NAME

    def stop() -> None:
        _RECORDERS.pop(layer, None)
        if not any(other.config is config for other in _RECORDERS):
            config._attn_implementation = before if before != NAME else "sdpa"

    return recorder, stop
