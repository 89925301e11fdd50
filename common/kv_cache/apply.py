"""Apply a cache pruner to a decoder of transformers for the length of a `with` block, and measure what it holds.

The model's attention goes through the seam, where the method decides behind the library's own. The cache's layers are
replaced by `PrunedLayer`, which counts the tokens seen and holds the entries that are left, so that positions go on as
without pruning. A pass's state lives with its cache, so that threads may share a model.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunelab.common.core import attention_interface as seam
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before, claimed, refuse_chunks, replaced, run_all, runs
from prunelab.common.core.plan import Gather, ModelInfo, Site
from prunelab.common.kv_cache.draft import Draft
from prunelab.common.kv_cache.layer import CacheState, Cascade, Growing, PrunedLayer, Stack
from prunelab.common.kv_cache.role import (
    CachePruner,
    CacheSignals,
    Cascades,
    Merges,
    OwnAttention,
    ReadsAhead,
    ShortensPrompt,
    ThinsVectors,
)

if TYPE_CHECKING:
    from transformers import Cache


UNSEEN = 64  # tokens whose hidden states are kept until they are noted together


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


class _WithoutGradient(torch.autograd.Function):
    """What a method computed in attention's place, through which no gradient flows: asking for one is an error."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor, name: str) -> Tensor:
        ctx.name = name
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise PrunelabError(f"{ctx.name} computes attention itself, without gradients; train outside of the block")


class CacheHandle:
    """A cache pruner at work on a decoder."""

    def __init__(
        self, method: CachePruner, model: nn.Module, budget: Budget, services: Mapping[str, Any], seed: int
    ) -> None:
        self.method, self.model, self.budget, self.services = method, model, budget, services
        self.decoder = seam.decoder_of(model)
        config = self.decoder.config
        self.depth: int = config.num_hidden_layers
        self.context: int = config.max_position_embeddings
        self.info = sizes(config)
        self.layers: list[PrunedLayer] = []  # of the cache that was used last
        if budget.unit not in ("ratio", "count", "removed"):
            raise PrunelabError(f"a cache is pruned to a ratio, a count or by a number removed, not to {budget}")
        if len(budget.amounts) not in (1, self.depth):
            raise PrunelabError(f"the budget names {len(budget.amounts)} amounts but the model has {self.depth} layers")
        self._budgets = [budget.at(layer) for layer in range(self.depth)]
        self._sites = [Site(layer, "block_output", layer) for layer in range(self.depth)]
        read = [method.requires(site) for site in self._sites]
        self._read = read[0]
        rests = isinstance(method, ThinsVectors) and method.resting and len(budget.amounts) == 1
        self._rests: ThinsVectors | None = method if rests else None  # type: ignore[assignment]
        self._alike = (
            method.alike and len(budget.amounts) == 1 and self._read <= {"queries", "keys", "values", "received"}
        )
        cascades = isinstance(method, Cascades) and method.cascades() and len(budget.amounts) == 1
        self._cascades: Cascades | None = method if cascades else None  # type: ignore[assignment]
        self._sound: Tensor | float = 0.0  # NaN or infinite once a pass came out so
        self._unseen: list[Tensor] = []  # what single tokens came out as since, [B, 1, D] each
        self._generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self._thread = threading.local()
        self._seed = seed
        self._rngs: dict[torch.device, torch.Generator] = {}

    def report(self) -> CacheReport:
        """See `CacheReport`. Needs a forward pass."""
        if not self.layers or not self.layers[0].is_initialized:
            raise PrunelabError("nothing ran yet; generate, or run the model with a cache, inside the `with` block")
        self._look()
        self._rest()
        stored = [layer.nbytes() for layer in self.layers]
        return CacheReport(
            tuple(layer.entries() for layer in self.layers),
            sum(held for held, _ in stored),
            sum(book for _, book in stored),
            sum(layer.dense_bytes() for layer in self.layers),
            self.layers[0].seen + self.layers[0].state.closed_up,
        )

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an image or video language model: which of its prompt's tokens stand for pictures."""
        ids = args[0] if args else kwargs.get("input_ids")
        named = (getattr(module.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        stand = [token for token in named if token is not None]
        self._thread.visual = None
        if isinstance(ids, Tensor) and ids.dim() == 2 and stand:
            self._thread.visual = torch.isin(ids, torch.tensor(stand, device=ids.device))

    # -- around the model ------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], Any] | None:
        """Before the decoder: take over its cache, see to padding, and let the method change the prompt."""
        given = kwargs
        if args:
            given = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
            given |= given.pop("kwargs", {})
        tokens, embedded = given.get("input_ids"), given.get("inputs_embeds")
        read: Any = embedded if tokens is None else tokens
        if read is None or read.shape[1] == 0:
            raise PrunelabError("the prompt is empty; give at least one token")
        if read.device.type == "meta":  # costs are counted on the model's own cache
            return None
        self._refuse(module, given)
        mask = given.get("attention_mask")
        past = self.take_over(seam.cache_in(given), mask)
        state, new = past.layers[0].state, read.shape[1]
        seen: int = past.get_seq_length()
        drafted = mask is not None and mask.dim() == 4 and runs(self.model, "draft_decoder")
        if mask is not None and not drafted:
            if mask.dim() != 2 or mask.shape[1] != seen + state.closed_up + new:
                raise PrunelabError(
                    "a pruned cache takes an attention mask of one column a token seen so far, not one of shape"
                    f" {tuple(mask.shape)}"
                )
            valid = mask[:, -new:].bool()
            valid = None if bool(valid.all()) else valid
        else:
            valid = None
        if valid is not None and not seen and not bool(valid[:, -1].all()):
            raise PrunelabError("samples must end with a token: pad on the left, and leave no sample empty")
        state.ahead, state.tree = 0, mask == 0 if drafted else None
        if seen == 0:
            valid = self._prompt(state, given, tokens, valid)
            new = read.shape[1] if tokens is None else given["input_ids"].shape[1]
        elif state.closed_up:
            real = torch.ones(read.shape[:2], device=read.device) if valid is None else valid
            counts = past.layers[0].counts
            counts = counts if isinstance(counts, int) else counts.unsqueeze(1)
            given["position_ids"] = counts + real.long().cumsum(1) - 1
        if seen + new - state.ahead > self.context:
            raise PrunelabError(
                f"{seen + new - state.ahead} tokens are more than the model's context of {self.context}; shorten the"
                " text"
            )
        plain = valid is None and not drafted
        if state.stack is not None and not self._stays(state, new, plain):
            state.unstack()
        elif state.stack is None and plain and new == 1 and seen and self._rests and self._level(past.layers):
            state.stack = Growing(past.layers, self._rests.frozen)
        state.fresh, state.running = valid, True
        self.layers = self._thread.layers = past.layers
        if state.stack is not None:
            state.stack.begin()
        self._thread.hidden = {}
        return (), seam.with_cache(given, past) | {"use_cache": True, "attention_mask": None}  # the cache decides

    def _refuse(self, module: nn.Module, given: Mapping[str, Any]) -> None:
        """Refuse passes whose cache or attention maps would not be what was asked for."""
        use = given.get("use_cache")
        if not (self.decoder.config.use_cache if use is None else use):
            raise PrunelabError(f"{self.method.name} prunes a cache and there is none; run the model with use_cache")
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise PrunelabError("gradient checkpointing reads a pass twice, a cache only once; switch it off")
        wants_attention = given.get("output_attentions")
        if self.decoder.config.output_attentions if wants_attention is None else wants_attention:
            raise PrunelabError(f"{self.method.name} leaves no attention maps; run the model without output_attentions")

    def _prompt(
        self, state: CacheState, given: dict[str, Any], tokens: Tensor | None, valid: Tensor | None
    ) -> Tensor | None:
        """Let the method shorten the prompt and write ahead; the validity [B, N] of what is read then."""
        method = self.method
        if not isinstance(method, (ShortensPrompt, ReadsAhead)):
            return valid
        if tokens is None:
            raise PrunelabError(f"{method.name} reads the prompt's tokens; give input_ids, not embeddings or pictures")
        chosen = None
        if isinstance(method, ShortensPrompt):
            chosen = method.shorten(tokens, valid, self.budget, self.services)
        if chosen is not None:
            state.closed_up = tokens.shape[1] - chosen.shape[1]
            tokens = tokens.gather(1, chosen)
            valid = None if valid is None else valid.gather(1, chosen)
            real = torch.ones_like(tokens) if valid is None else valid.long()
            given["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
        if isinstance(method, ReadsAhead):
            ahead = method.lookahead(tokens, valid, self.budget, self.services)
            state.ahead = ahead.shape[1]
            tokens = torch.cat([tokens, ahead], 1)
            indices = given.get("position_ids")
            if indices is not None and state.ahead:
                more = torch.arange(1, state.ahead + 1, device=indices.device)
                given["position_ids"] = torch.cat([indices, indices[:, -1:] + more], 1)
            if valid is not None:
                valid = torch.cat([valid, torch.ones_like(ahead, dtype=torch.bool)], 1)
        given["input_ids"] = tokens
        return valid

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the decoder: nobody sees what was written ahead."""
        layers = getattr(self._thread, "layers", None)
        if layers is None:
            return output
        state = layers[0].state
        if isinstance(state.stack, Growing):
            assert self._rests is not None
            with torch.no_grad():
                self._rests.thin(self._sites[0], *state.stack.now, 1, self._budgets[0])
            state.stack.entries += 1
        elif isinstance(state.stack, Stack):
            self._step(state)
        elif state.stack is None and self._cascades and self._level(layers):
            state.stack = Cascade(layers)
        elif state.stack is None and self._alike and self._level(layers):
            state.stack = Stack(layers)
        self._unseen.append(output.last_hidden_state[:, -1:].detach())
        if output.last_hidden_state.shape[1] > 1:
            self._look()
        elif len(self._unseen) >= UNSEEN:
            self._gather()
        state.running, state.fresh, state.tree = False, None, None
        self._thread.layers, self._thread.hidden = None, {}
        if state.ahead:
            output.last_hidden_state = output.last_hidden_state[:, : -state.ahead]
            if output.hidden_states is not None:
                output.hidden_states = tuple(hidden[:, : -state.ahead] for hidden in output.hidden_states)
        return output

    def leave(self) -> None:
        """At the end of the block, also where an exception left a pass half done."""
        if self.layers:
            self.layers[0].state.running = False
            self.layers[0].state.unstack()
            self._rest()

    def _rest(self) -> None:
        """What became dense to be written becomes bitmaps again."""
        for layer in self.layers if self._rests else ():
            if layer.is_initialized:
                layer.rest(self._rests.frozen)  # type: ignore[union-attr]

    def _gather(self) -> None:
        """Note what came out since, of many tokens at once: a sum a token would cost as much as what it guards."""
        unseen, self._unseen = self._unseen, []
        if unseen:
            self._sound = self._sound + torch.cat([out.flatten() for out in unseen]).sum(dtype=torch.float32)

    def _look(self) -> None:
        """Read what was noted on the device: once a prompt, a report and a block, never for a token."""
        self._gather()
        sound, self._sound = self._sound, 0.0
        if isinstance(sound, Tensor) and not bool(sound.isfinite()):
            raise PrunelabError(
                "the model's hidden states hold NaN or infinite values; check the input and the weights"
            )

    # -- all layers at once ----------------------------------------------------------------------------------------

    def _level(self, layers: list[PrunedLayer]) -> bool:
        """Whether all layers hold what they may, equally much of equally many tokens, on one device."""
        first = layers[0]
        if not first.is_initialized:
            return False
        if self.method.when == "prefill" or torch.is_grad_enabled() or len(set(first.prompt)) != 1:
            return False
        if any(layer.valid is not None or layer.pads is not None or layer.seen != first.seen for layer in layers):
            return False
        if runs(self.model, "token_pruner"):
            return False
        alike = {(layer.keys.shape, layer.values.shape, layer.keys.device, *layer.marks) for layer in layers}
        if self._rests:
            return len(alike) == 1
        return len(alike) == 1 and first.keys.shape[2] == self.method.capacity(self._budgets[0], first.prompt)[0] > 0

    def _stays(self, state: CacheState, new: int, plain: bool) -> bool:
        """Whether the pass at hand is a step that the stack knows: one token each, without padding."""
        assert state.stack is not None
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return plain and new == 1 and modes == (False, state.stack.inference)

    def _step(self, state: CacheState) -> None:
        """Decide for all layers of a decoding step at once, as if they were samples of a batch."""
        stack = state.stack
        assert isinstance(stack, Stack)
        layers = stack.layers
        sources: dict[str, Callable[[], Tensor]] = {
            "queries": lambda: torch.cat(stack.queries),
            "keys": lambda: stack.keys,
            "values": lambda: stack.values,
            "received": lambda: signals.accumulated(),
        }
        marks = dict(stack.marks)
        with torch.no_grad():
            signals = CacheSignals(
                sources,
                scale=stack.scale,
                indices=stack.indices,
                prompt=layers[0].prompt * len(layers),
                seen=layers[0].seen,
                marks=marks,
                prefill=False,
                attention=stack.attention,
                info=self.info,
                rng=self._rng(stack.indices.device),
                required=self._read,
                services=self.services,
                memory=state.memory,
            )
            kept = self.method.plan(self._sites[0], signals, self._budgets[0]).reduce
            assert isinstance(kept, Gather)
            if not stack.keep(kept, marks):
                state.unstack()
                for layer, index in zip(layers, kept.index.unflatten(0, (len(layers), -1))):
                    layer.keep(Gather(index))

    def take_over(self, past: Cache | None, mask: Tensor | None) -> Cache:
        """The cache with layers that can be pruned, or an error that names what cannot. What a cache already holds is
        padding where the mask says so."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        past = DynamicCache(config=self.decoder.config) if past is None else past
        if past.layers and isinstance(past.layers[0], PrunedLayer):
            return past
        unlike = {type(layer).__name__ for layer in past.layers} - {DynamicLayer.__name__}
        if not isinstance(past, DynamicCache) or unlike:
            raise PrunelabError(
                f"a {', '.join(sorted(unlike)) or type(past).__name__} does not hold one entry a token; use a"
                " DynamicCache"
            )
        state = CacheState(running=True)
        new = [PrunedLayer(state, index) for index in range(self.depth)]
        held: int = past.get_seq_length() if past.layers else 0
        fresh = None
        if held and mask is not None and mask.dim() == 2 and not bool(mask[:, :held].all()):
            fresh = mask[:, :held].bool()
        for old, layer in zip(past.layers, new):
            if old.get_seq_length():
                layer.update(old.keys, old.values)
                layer.admit(fresh)
        past.layers[:] = new
        return past

    # -- inside a layer --------------------------------------------------------------------------------------------

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer's attention: what it reads, for methods that require `hidden`."""
        if getattr(self._thread, "layers", None) is not None:
            self._thread.hidden[module] = args[0] if args else kwargs["hidden_states"]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attention [B, M, H, d] of a layer whose cache was just updated, and its pruning."""
        layers, method = getattr(self._thread, "layers", None), self.method
        if layers is None:  # the layer was called by itself
            return None
        layer: PrunedLayer = layers[module.layer_idx]
        state, site = layer.state, self._sites[layer.index]
        if isinstance(state.stack, Stack):
            state.stack.queries.append(query)
            state.stack.scale = scale
            exact = query.dtype == key.dtype == value.dtype == torch.float32 and not module.training
            return state.stack.attend(layer.index, query, scale) if exact and "queries" in self._read else None
        if isinstance(state.stack, Growing):
            return None
        if isinstance(state.stack, Cascade):
            assert self._cascades is not None
            outputs, worth = self._cascades.step(query, key, value, scale)
            state.stack.add(layer.index, worth)
            return outputs.to(query.dtype).transpose(1, 2)
        fresh = state.fresh
        if mask is not None and runs(self.model, "token_pruner"):  # which left this layer other tokens than the first
            fresh = mask[:, 0, -1, -query.shape[2] :].expand(len(query), -1)
        prefill = layer.seen == 0
        layer.admit(fresh)
        hidden = self._thread.hidden
        sources = {"queries": lambda: query, "hidden": lambda: hidden[module]}
        budget = self._budgets[layer.index]
        output = None
        if isinstance(method, OwnAttention):
            with torch.no_grad():
                output = method.attend(site, self.signals(layer, site, sources, scale, prefill, fresh), budget)
        if output is None:
            output = seam.sdpa(module, query, layer.keys, layer.values, layer.mask(), scale)
        else:
            output = output.to(query.dtype).transpose(1, 2)
            if query.requires_grad and torch.is_grad_enabled():
                output = _WithoutGradient.apply(output, query, method.name)
        if method.when == "both" or method.when == ("prefill" if prefill else "decode"):
            with torch.no_grad():
                sources = {**sources, "outputs": lambda: output.transpose(1, 2)}
                signals = self.signals(layer, site, sources, scale, prefill, fresh)
                kept = method.plan(site, signals, budget).reduce
                assert isinstance(kept, Gather)
                if isinstance(method, ThinsVectors):
                    if output.requires_grad:  # whose backward pass reads what attention saw
                        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
                    method.thin(site, layer.keys, layer.values, layer.added, budget, signals)
                merged = method.merge(signals, kept) if isinstance(method, Merges) else None
                layer.keep(kept)
                if merged is not None:
                    layer.keys, layer.values = merged
        if prefill and state.ahead:
            layer.forget(state.ahead)
        if isinstance(method, ThinsVectors):
            layer.pack(method.frozen(layer.keys.shape[2]))
        return output

    def signals(
        self,
        layer: PrunedLayer,
        site: Site,
        sources: Mapping[str, Callable[[], Tensor]],
        scale: float,
        prefill: bool,
        fresh: Tensor | None,
    ) -> CacheSignals:
        """What the method may see of a layer now."""
        valid, ahead = layer.valid, layer.state.ahead if prefill else 0
        if ahead:
            valid = torch.ones_like(layer.indices, dtype=torch.bool) if valid is None else valid.clone()
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
            indices=layer.indices,
            prompt=tuple(length - ahead for length in layer.prompt),
            seen=layer.seen,
            marks=layer.marks,
            prefill=prefill,
            ahead=ahead,
            asking=fresh,
            valid=valid,
            info=self.info,
            rng=self._rng(layer.keys.device),
            required=self.method.requires(site) - ({"outputs"} - given.keys()),
            services=self.services,
            memory=layer.state.memory,
            visual=getattr(self._thread, "visual", None) if prefill else None,
        )
        return signals

    def _rng(self, device: torch.device) -> torch.Generator:
        if device not in self._rngs:
            self._rngs[device] = torch.Generator(device).manual_seed(self._seed)
        return self._rngs[device]

    # -- generate --------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **options: Any) -> Any:
        """The model's own `generate`, whose prompt is read in one piece."""
        refuse_chunks(self.method.name, self.model, options)
        return self._generate(*args, **options)


def check(method: CachePruner, model: nn.Module) -> None:
    """Raises PrunelabError where the model has no cache that the method can prune."""
    config = seam.decoder_of(model).config
    if seam.windowed(config):
        raise PrunelabError(
            f"layers of a {config.model_type} with a sliding window hide entries by themselves; set"
            " config.sliding_window=None before the model is built"
        )
    if reason := method.misfit(sizes(config)):
        raise PrunelabError(reason)


def sizes(config: Any) -> ModelInfo:
    """The sizes of a decoder, by its config."""
    return ModelInfo(
        "decoder",
        config.num_hidden_layers,
        config.num_attention_heads,
        config.hidden_size,
        config.max_position_embeddings,
    )


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
    the layers or the method, the prompt is empty or longer than the context, or the model runs a method already that
    this one has no meaning beside.
    """
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    with claimed(method, model, services), ExitStack() as stack:
        check(method, model)
        handle = CacheHandle(method, model, budget, _served(model, services or {}), seed)
        layers = seam.attention_layers(handle.decoder)
        removers: list[Callable[[], Any]] = []
        stack.callback(run_all, removers)
        stack.callback(handle.leave)
        stack.enter_context(seam.replaced(layers, handle.attend))
        removers.append(replaced(model, "generate", handle.generate))
        if handle.decoder is not model:
            removers.append(before(model, handle.see, kwargs=True))
        removers.append(before(handle.decoder, handle.begin, kwargs=True))
        removers.append(after(handle.decoder, handle.end))
        if any("hidden" in method.requires(Site(i, index=i)) for i in range(handle.depth)):
            removers += [before(layer, handle.note, kwargs=True) for layer in layers]
        yield handle
        handle._look()


def _served(model: nn.Module, services: Mapping[str, Any]) -> dict[str, Any]:
    """The services as methods see them: a language model becomes a draft, which must speak the target's tokens."""
    served = {name: Draft(s) if isinstance(s, nn.Module) else s for name, s in services.items()}
    vocabulary = int(seam.decoder_of(model).config.vocab_size)
    for name, service in served.items():
        if isinstance(service, Draft) and service.model is model:
            raise PrunelabError(f"the {name} is the model itself; load it a second time")
        if isinstance(service, Draft) and service.vocabulary != vocabulary:
            raise PrunelabError(
                f"the {name} has a vocabulary of {service.vocabulary} and the model one of {vocabulary};"
                " both must read the same tokens"
            )
    return served
