"""Apply a cache pruner to a decoder of transformers for the length of a `with` block, and measure what it holds.

The model's attention goes through a function of ours that calls the library's own and then lets the method decide.
The cache's layers are replaced by `PrunedLayer`, which counts the tokens seen and holds the entries that are left, so
that positions go on as without pruning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import run_all
from prunelab.common.core.plan import Gather, ModelInfo, Site
from prunelab.common.kv_cache.draft import Draft
from prunelab.common.kv_cache.intercept import attentions, fused, intercepted
from prunelab.common.kv_cache.layer import PrunedLayer, Stream
from prunelab.common.kv_cache.role import CachePruner, CacheSignals

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class CacheReport:
    """What the cache held after the last pass: `entries` a head and sample at each layer, the measured bytes of its
    keys and values, of the book kept of them, and of the cache without pruning at the same number of tokens."""

    entries: tuple[float, ...]
    cache_bytes: int
    book_bytes: int
    dense_bytes: int
    tokens: int

    @property
    def ratio(self) -> float:
        """Share of the unpruned cache's bytes."""
        return self.cache_bytes / self.dense_bytes if self.dense_bytes else 1.0

    def __str__(self) -> str:
        return (
            f"cache     {self.cache_bytes / 2**20:.3f} MiB of {self.dense_bytes / 2**20:.3f} MiB"
            f" ({100 * self.ratio:.1f} %) after {self.tokens} tokens; {self.book_bytes / 2**20:.3f} MiB of book\n"
            "entries   " + " ".join(f"{n:g}" for n in self.entries)
        )


class CacheHandle:
    """A cache pruner at work on a decoder."""

    def __init__(self, method: CachePruner, model: Any, budget: Budget, services: Mapping[str, Any], seed: int) -> None:
        self.method, self.model, self.budget, self.services = method, model, budget, services
        config = model.config
        self.depth: int = config.num_hidden_layers
        self.context: int = config.max_position_embeddings
        self.info = ModelInfo(
            "decoder", self.depth, config.num_attention_heads, config.hidden_size, config.max_position_embeddings
        )
        self.stream = Stream()
        self.layers: list[PrunedLayer] = []
        self.hidden: dict[nn.Module, Tensor] = {}
        self.ahead = 0
        self._seed = seed
        self._rngs: dict[torch.device, torch.Generator] = {}
        self._last: dict[int, tuple[float, int, int, int]] = {}
        self._tokens = 0

    def report(self) -> CacheReport:
        """See `CacheReport`. Needs a forward pass."""
        if not self._last:
            raise PrunelabError("nothing ran yet; generate, or run the model with a cache, inside the `with` block")
        entries, held, book, dense = zip(*(self._last[layer] for layer in sorted(self._last)))
        return CacheReport(entries, sum(held), sum(book), sum(dense), self._tokens + self.stream.closed_up)

    # -- around the model ------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Any]:
        """Before the decoder: take over its cache, see to padding, and let the method change the prompt."""
        given = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        tokens, embedded = given.get("input_ids"), given.get("inputs_embeds")
        read: Any = embedded if tokens is None else tokens
        if read is None or read.shape[1] == 0:
            raise PrunelabError("the prompt is empty; give at least one token")
        use = given.get("use_cache")
        if not (self.model.config.use_cache if use is None else use):
            raise PrunelabError(f"{self.method.name} prunes a cache and there is none; run the model with use_cache")
        mask = given.get("attention_mask")
        past = given["past_key_values"] = self.take_over(given.get("past_key_values"), mask)
        given["use_cache"] = True
        seen = past.get_seq_length()
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != seen + self.stream.closed_up + read.shape[1]):
            raise PrunelabError(
                "a pruned cache takes an attention mask of one column a token seen so far, not one of shape"
                f" {tuple(mask.shape)}"
            )
        valid = None if mask is None else mask[:, -read.shape[1] :].bool()
        if valid is not None and not seen and not bool(valid[:, -1].all()):
            raise PrunelabError("samples must end with a token: pad on the left, and leave no sample empty")
        self.ahead = 0
        if seen == 0:
            valid = self._prompt(given, tokens, valid)
        elif self.stream.closed_up:
            real = torch.ones(read.shape[:2], device=read.device) if valid is None else valid
            given["position_ids"] = self.layers[0].counts.unsqueeze(1) + real.long().cumsum(1) - 1
        self.stream.fresh = None if valid is None or bool(valid.all()) else valid
        length = read.shape[1] if tokens is None else given["input_ids"].shape[1]
        self._tokens = seen + length - self.ahead
        if self._tokens > self.context:
            raise PrunelabError(
                f"{self._tokens} tokens are more than the model's context of {self.context}; shorten the text"
            )
        given["attention_mask"] = None  # what the cache holds decides instead
        return (), given

    def _prompt(self, given: dict[str, Any], tokens: Tensor | None, valid: Tensor | None) -> Tensor | None:
        """Let the method shorten the prompt and write ahead; the validity [B, N] of what is read then."""
        if tokens is None:
            return valid
        chosen = self.method.shorten(tokens, valid, self.budget, self.services)
        if chosen is not None:
            self.stream.closed_up = tokens.shape[1] - chosen.shape[1]
            tokens = tokens.gather(1, chosen)
            valid = None if valid is None else valid.gather(1, chosen)
            real = torch.ones_like(tokens) if valid is None else valid.long()
            given["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
        ahead = self.method.lookahead(tokens, valid, self.budget, self.services)
        self.ahead = ahead.shape[1]
        if self.ahead:
            tokens = torch.cat([tokens, ahead], 1)
            places = given.get("position_ids")
            if places is not None:
                more = torch.arange(1, self.ahead + 1, device=places.device)
                given["position_ids"] = torch.cat([places, places[:, -1:] + more], 1)
            if valid is not None:
                valid = torch.cat([valid, torch.ones_like(ahead, dtype=torch.bool)], 1)
        given["input_ids"] = tokens
        return valid

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the decoder: nobody sees what was written ahead."""
        self.stream.fresh = None
        self.hidden.clear()
        if self.ahead:
            output.last_hidden_state = output.last_hidden_state[:, : -self.ahead]
        return output

    def take_over(self, past: Cache | None, mask: Tensor | None) -> Cache:
        """The cache with layers that can be pruned, or an error that names what cannot. What a cache already holds is
        padding where the mask says so."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        past = DynamicCache(config=self.model.config) if past is None else past
        unlike = {type(layer).__name__ for layer in past.layers} - {DynamicLayer.__name__, PrunedLayer.__name__}
        if not isinstance(past, DynamicCache) or unlike:
            raise PrunelabError(
                f"a {', '.join(sorted(unlike)) or type(past).__name__} does not hold one entry a token; use a"
                " DynamicCache, and for models with a sliding window set config.sliding_window=None first"
            )
        if not any(isinstance(layer, PrunedLayer) for layer in past.layers):
            stream = Stream()
            if mask is not None and mask.dim() == 2 and not bool(mask.all()):
                stream.fresh = mask[:, : past.get_seq_length()].bool()
            new = [PrunedLayer(stream, index) for index in range(self.depth)]
            for old, layer in zip(past.layers, new):
                if old.get_seq_length():
                    layer.update(old.keys, old.values)
            past.layers[:] = new
        self.layers = past.layers
        self.stream = self.layers[0].stream
        return past

    # -- inside a layer --------------------------------------------------------------------------------------------

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer's attention: what it reads, for methods that require `hidden`."""
        self.hidden[module] = args[0] if args else kwargs["hidden_states"]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [B, M, H, d] of a layer whose cache was just updated, and its pruning."""
        layer, method = self.layers[module.layer_idx], self.method  # type: ignore[index]
        site = Site(layer.index, "block_output", layer.index)
        prefill = layer.seen == layer.added
        sources = {"queries": lambda: query, "hidden": lambda: self.hidden[module]}
        budget = self.budget.at(layer.index)
        output = None
        if type(method).attend is not CachePruner.attend:
            with torch.no_grad():
                output = method.attend(site, self.signals(layer, site, sources, scale, prefill), budget)
        if output is None:
            output = fused(module, query, layer.keys, layer.values, layer.mask(), scale)
        else:
            output = output.to(query.dtype).transpose(1, 2)
        acts = method.when == "both" or method.when == ("prefill" if prefill else "decode")
        if acts:
            with torch.no_grad():
                signals = self.signals(
                    layer, site, {**sources, "outputs": lambda: output.transpose(1, 2)}, scale, prefill
                )
                kept = method.plan(site, signals, budget).reduce
                assert isinstance(kept, Gather)
                layer.keys, layer.values = method.thin(site, layer.keys, layer.values, signals, budget)
                layer.keep(kept)
        if prefill and self.ahead:
            layer.forget(self.ahead)
        if method.storage == "bitmap":
            layer.pack(method.settled(layer.keys.shape[2]))
        self._last[layer.index] = (layer.entries(), *layer.nbytes(), layer.dense_bytes())
        return output

    def signals(
        self,
        layer: PrunedLayer,
        site: Site,
        sources: Mapping[str, Callable[[], Tensor]],
        scale: float,
        prefill: bool,
    ) -> CacheSignals:
        """What the method may see of a layer now."""
        valid, ahead = layer.valid, self.ahead if prefill else 0
        if ahead:
            valid = torch.ones_like(layer.places, dtype=torch.bool) if valid is None else valid.clone()
            valid[..., -ahead:] = False
        given: dict[str, Callable[[], Tensor]] = {
            "keys": lambda: layer.keys,
            "values": lambda: layer.values,
            "received": lambda: signals.accumulated(),
            **sources,
        }
        signals = CacheSignals(
            given,
            scale=scale,
            places=layer.places,
            prompt=layer.prompt - ahead,
            marks=layer.marks,
            prefill=prefill,
            ahead=ahead,
            asking=self.stream.fresh,
            valid=valid,
            info=self.info,
            rng=self._rng(layer.keys.device),
            required=self.method.requires(site) - ({"outputs"} - given.keys()),
            services=self.services,
            memory=self.stream.carry,
        )
        return signals

    def _rng(self, device: torch.device) -> torch.Generator:
        if device not in self._rngs:
            self._rngs[device] = torch.Generator(device).manual_seed(self._seed)
        return self._rngs[device]


def check(method: CachePruner, model: nn.Module) -> None:
    """Raises PrunelabError where the model has no cache that the method can prune."""
    attentions(model)


@contextmanager
def applied(
    method: CachePruner,
    model: nn.Module,
    budget: Budget | float,
    *,
    services: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Iterator[CacheHandle]:
    """Prune the model's cache by `method` under `budget` inside the `with` block: with `generate` and in every forward
    pass that uses a cache. The budget has one amount, or one a layer.

    The model's weights and forward stay as they are: all hooks come out at the end, also after an exception. Raises
    PrunelabError where the model or the kind of cache is not supported, a service is missing, the budget does not fit
    the layers or the method, the prompt is empty or longer than the context, or a method is already applied.
    """
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    missing = set(method.services) - set(services or {})
    if missing:
        raise PrunelabError(f"{method.name} needs the services {', '.join(sorted(missing))}; pass services={{...}}")
    check(method, model)
    served = {name: Draft(s) if isinstance(s, nn.Module) else s for name, s in (services or {}).items()}
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    for name, service in served.items():
        if isinstance(service, Draft) and service.model is model:
            raise PrunelabError(f"the {name} is the model itself; load it a second time")
        if isinstance(service, Draft) and service.vocabulary != vocabulary:
            raise PrunelabError(
                f"the {name} has a vocabulary of {service.vocabulary} and the model one of {vocabulary};"
                " both must read the same tokens"
            )
    if budget.unit not in ("ratio", "count", "removed"):
        raise PrunelabError(f"a cache is pruned to a ratio, a count or by a number removed, not to {budget}")
    handle = CacheHandle(method, model, budget, served, seed)
    if len(budget.amounts) not in (1, handle.depth):
        raise PrunelabError(f"the budget names {len(budget.amounts)} amounts but the model has {handle.depth} layers")
    if getattr(model, "_prunelab_method", None):
        raise PrunelabError(f"this model already runs {model._prunelab_method}; leave that `with` block first")
    removers: list[Callable[[], Any]] = []
    object.__setattr__(model, "_prunelab_method", method.name)
    try:
        with intercepted(model, handle.attend) as modules:
            decoder: Any = model.base_model
            removers.append(decoder.register_forward_pre_hook(handle.begin, with_kwargs=True).remove)
            removers.append(decoder.register_forward_hook(handle.end).remove)
            if any("hidden" in method.requires(Site(i, index=i)) for i in range(handle.depth)):
                removers += [m.register_forward_pre_hook(handle.note, with_kwargs=True).remove for m in modules]
            yield handle
    finally:
        run_all(removers)
        object.__delattr__(model, "_prunelab_method")
