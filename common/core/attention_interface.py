"""The one seam into transformers: its attention, watched and replaced, and the names that its releases changed.

Every attention layer of transformers hands its queries, keys, values and mask to a registered function. Ours leaves
them, as they are and uncopied, with the recorders of that layer, from which rows of attention are computed only when a
method reads them; then at most one method answers in the library's place, and without one the stock SDPA does. Eager
attention never runs. Models that share a configuration share the function, not what watches or answers.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention, hooks
from prunelab.common.core.errors import PrunelabError

NAME = "prunelab"
FAMILIES = (  # decoders, by model type
    "llama", "qwen2", "qwen3", "mistral", "phi", "gpt_neox", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
    "qwen2_5_vl_text", "qwen2_vl_text",
)  # fmt: skip

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]
# By id, since every layer of every step asks; whoever takes them out again keeps the layers alive.
_RECORDERS: dict[int, tuple[Recorder, ...]] = {}
_ATTEND: dict[int, Attend] = {}
_SWITCHED: dict[int, tuple[Any, str, int]] = {}  # by id: a configuration, its own implementation, and its users


class Recorder(threading.local):
    """What one attention layer last worked on, in each thread: queries [B, H, N, d], keys [B, H, M, d] (grouped ones
    repeated)."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.ahead = False  # whether the layer is asked for queries and keys alone, before its turn
        self.only: Tensor | None = None  # [B, 1] then the token whose query is wanted; None: all
        self.clear()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.queries: Tensor | None = None
        self._keys: Tensor | None = None
        self.mask: Tensor | None = None
        self.scale = 1.0

    def taken(self) -> Recorder:
        """The same for later, whatever the layer works on next."""
        copy = Recorder(self.causal)
        copy.queries, copy._keys, copy.mask, copy.scale = self.queries, self._keys, self.mask, self.scale
        return copy

    def see(self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float | None) -> None:
        """Called by the attention function."""
        self.queries, self._keys, self.mask = queries, keys, mask
        self.scale = queries.shape[-1] ** -0.5 if scale is None else scale

    @contextmanager
    def asking(self, only: Tensor | None = None) -> Iterator[None]:
        """Inside the block the layer makes keys and queries for this recorder alone, the latter of the one token [B, 1]
        if that is given, and attends to nothing. See `spared`."""
        self.ahead, self.only = True, only
        try:
            yield
        finally:
            self.ahead, self.only = False, None

    def shown(self) -> Tensor:
        """The queries [B, H, N, d] of the last forward pass."""
        if self.queries is None:
            raise PrunelabError(
                "no attention was recorded for this input; give the model pixels, not features computed before"
            )
        return self.queries

    @property
    def grouped_keys(self) -> Tensor:
        """[B, KV, M, d], one set for the query heads that share it."""
        self.shown()
        assert self._keys is not None
        return self._keys

    @property
    def keys(self) -> Tensor:
        """[B, H, M, d], one set a query head."""
        return self.grouped_keys.repeat_interleave(self.shown().shape[1] // self.grouped_keys.shape[1], 1)

    def _visible(self, rows: Tensor | None) -> Tensor | None:
        """Which keys the query rows [B, R] (None: all) see, as logit offsets [B or 1, 1, R, M], from the mask that the
        layer was given."""
        queries, mask = self.shown(), self.mask
        if mask is None:
            count = queries.shape[2]
            if not self.causal or count == 1:
                return None
            indices = torch.arange(count, device=queries.device)
            mask = indices <= (indices.view(1, 1, -1, 1) if rows is None else rows[:, None, :, None])
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


class _Switched(str):
    """The seam's name in a configuration. A copy of it, and what is saved of it, name the implementation before."""

    before: str

    def __new__(cls, before: str) -> _Switched:
        name = super().__new__(cls, NAME)
        name.before = before
        return name

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self.before

    def __reduce__(self) -> Any:
        return str, (self.before,)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def seam(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        recorders = _RECORDERS.get(id(module), ())
        asking = [recorder for recorder in recorders if recorder.ahead]
        for recorder in asking or recorders:
            recorder.see(query, key, attention_mask, options.get("scaling"))
        if asking:
            return torch.zeros_like(query.transpose(1, 2)), None
        attend = _ATTEND.get(id(module))
        if attend is not None and query.device.type != "meta":  # costs are counted on the model's own attention
            output = attend(module, query, key, value, attention_mask, options["scaling"])
            if output is not None:
                return output, None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(NAME, seam)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without it padded batches would run unmasked


def _switch(config: Any) -> Callable[[], None]:
    """Send the attention of a configuration's models through the seam, until every such call is taken back."""
    _register()
    _, before, users = _SWITCHED.get(id(config), (config, config._attn_implementation, 0))
    _SWITCHED[id(config)] = (config, before, users + 1)
    config._attn_implementation = _Switched(before)

    def back() -> None:
        _, before, users = _SWITCHED.pop(id(config))
        if users > 1:
            _SWITCHED[id(config)] = (config, before, users - 1)
        else:
            config._attn_implementation = before

    return back


def implementation(config: Any) -> str:
    """The attention that a configuration asks for, also while it goes through the seam."""
    name: str = _SWITCHED[id(config)][1] if id(config) in _SWITCHED else config._attn_implementation
    return name


def record(layer: Any) -> tuple[Recorder, Callable[[], Any]]:
    """Record one attention layer until the returned function is called. Its whole backbone runs SDPA meanwhile."""
    recorder, back = Recorder(bool(getattr(layer, "is_causal", True))), _switch(layer.config)
    _RECORDERS[id(layer)] = (*_RECORDERS.get(id(layer), ()), recorder)

    def stop() -> None:
        left = tuple(other for other in _RECORDERS.pop(id(layer), ()) if other is not recorder)
        if left:
            _RECORDERS[id(layer)] = left
        back()

    return recorder, stop


def spared(layer: Any, recorder: Recorder) -> list[Callable[[], Any]]:
    """Let an attention layer, while its recorder asks, multiply no more than it is asked for: neither values nor an
    output, and one query a sample where one is wanted. Returns what undoes it."""

    def queries(x: Tensor) -> Tensor:
        if recorder.only is None:
            whole: Tensor = project(x)
            return whole
        one: Tensor = project(x.gather(1, recorder.only.unsqueeze(-1).expand(-1, -1, x.shape[2])))
        return one.expand(-1, x.shape[1], -1)

    def idle(projection: Any) -> Callable[[Tensor], Tensor]:
        own = projection.forward

        def work(x: Tensor) -> Tensor:
            out: Tensor = x.new_zeros(()).expand(*x.shape[:-1], projection.out_features) if recorder.ahead else own(x)
            return out

        return work

    project = layer.q_proj.forward
    idlers = [hooks.replaced(part, "forward", idle(part)) for part in (layer.v_proj, layer.o_proj)]
    return [hooks.replaced(layer.q_proj, "forward", queries), *idlers]


@contextmanager
def replaced(layers: Iterable[Any], attend: Attend) -> Iterator[None]:
    """Let `attend` answer for attention layers inside the block: from a layer, queries [B, H, M, d], keys and values
    [B, KV, N, d], the mask that the layer was given and the scale to the heads' outputs [B, M, H, d], or None where
    the library shall go on as if nobody had been asked."""
    layers = list(layers)
    if any(id(layer) in _ATTEND for layer in layers):
        raise PrunelabError("another method already computes this model's attention; leave that `with` block first")
    backs = [_switch(config) for config in {id(layer.config): layer.config for layer in layers}.values()]
    _ATTEND.update(dict.fromkeys(map(id, layers), attend))
    try:
        yield
    finally:
        for layer in layers:
            _ATTEND.pop(id(layer), None)
        for back in backs:
            back()


def sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The library's own attention [B, M, H, d] under a mask [B, 1 or KV, M, N] over the module's heads."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(query.shape[1] // key.shape[1], 1)
    output: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scale)[0]
    return output


# -- decoders and their caches -----------------------------------------------------------------------------------------


def decoder_of(model: nn.Module) -> Any:
    """The decoder of a causal language model, also of the one within an image or video model or an adapter of `peft`.
    Raises where the family is not supported."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None and hasattr(model, "generate") else None
    if getattr(getattr(decoder, "config", None), "model_type", None) not in FAMILIES:
        raise PrunelabError(
            f"{type(model).__name__} has no cache that can be pruned here; use a causal language model of the families"
            f" {', '.join(FAMILIES)}"
        )
    return decoder


def windowed(config: Any) -> bool:
    """Whether some layers of a decoder see a window of the text alone, or none of it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(kinds - {"full_attention"}) or (not kinds and getattr(config, "sliding_window", None) is not None)


def attention_layers(decoder: nn.Module) -> list[Any]:
    """The attention modules of a decoder, by layer."""
    results: list[Any] = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    return sorted(results, key=lambda module: module.layer_idx)


@cache
def cache_name() -> str:
    """What this release of transformers calls a cache among arguments and outputs."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"  # the latter before 5.24


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among a module's arguments or outputs, by the name of any release; None where there is none."""
    result = given.get("cache")
    return given.get("past_key_values") if result is None else result


def pixels_name(model: Any) -> str:
    """What this release of transformers calls the pixels of images that a class's encoder reads."""
    names = inspect.signature(model.get_image_features).parameters
    return "pixel_values" if "pixel_values" in names else "pixel_values_images"  # the latter before 5.23


def pixels_in(given: Mapping[str, Any], modality: str) -> Tensor:
    """The pixels among the arguments of an encoder of images or videos, by the name of any release."""
    if modality == "video":
        result: Tensor = given["pixel_values_videos"]
    else:
        result = given["pixel_values" if given.get("pixel_values") is not None else "pixel_values_images"]
    return result


def with_cache(given: Mapping[str, Any], held: Any) -> dict[str, Any]:
    """The arguments with this cache, under the one name that this release knows."""
    rest = {name: value for name, value in given.items() if name not in ("cache", "past_key_values")}
    return rest | {cache_name(): held}
