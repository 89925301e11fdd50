"""Causal language models of transformers, whose prompt tokens leave on their way up and may come back while decoding.

A unit is a token of the prompt; its last one, what is generated and padding are never pruned. Sites are the `input` of
decoder layers, with the attention of the layer before at hand. Between two sites lies a segment of layers, and a token
goes through a segment as a whole or not at all. What leaves keeps its position and its entries in the caches of the
layers that it went through. By a plan's `rest`:

- `drop`: it is gone. The method decides once, at the prompt.
- `bypass`: it passes by the one layer and is back behind it.
- `defer`: its hidden state waits before the segment, and the method decides anew for every token that is generated.
  What it then chooses is read from the cache where it is there; what waits is computed along with the newest token and
  never again. The units of a decision are the tokens that are active in the layer before, in the cache or computed now,
  so that only `keys` and `last_row` can be read.

Samples whose last token is not in the last column are refused. A segment's caches hold the entries in the order in
which they were computed; samples of one batch that get back fewer tokens than others hold entries that do not count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunelab.common.core import selection
from prunelab.common.core.attention_interface import NAME, Recorder, cache_in, implementation, record
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before, padded_first, refuse_checkpointing, refuse_tracing, run_all
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Site, take
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.causal_lm_cache import Entries, PromptCache, in_order, visible
from prunelab.common.tokens.adapters.passes import Application, Pass, Seen, Tokens, Trace
from prunelab.common.tokens.adapters.recorded import (
    ALONE,
    FIXED,
    UNSHOWN,
    behind_a_bypass,
    fixed,
    keeper,
    newest_row,
    received,
    sources,
    windowed,
)
from prunelab.common.tokens.adapters.sequence import SequenceAdapter
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import View

_ALWAYS = frozenset({"hidden", "sizes"})
_LASTING = frozenset({"keys", "last_row"})  # what can be read of tokens that are in the cache alone
_ATTENTION = _LASTING | {"queries", "attention_logits", "attention", "received"}
_EXAMPLE = 4096  # assumption: tokens of the standard prompt, where the model's context is not shorter


@dataclass
class PromptPass(Pass):
    """cache: what is known of the batch. new: tokens at hand. deciding: whether
    sites decide in this pass. Of the segment at work: its number, rows [B, R] that go through it, how many of them are
    of the prompt (counted), and the arguments of its layers (aids)."""

    cache: PromptCache = field(init=False)
    new: int = 0
    deciding: bool = True
    segment: int = 0
    rows: Entries = field(init=False)
    counted: int | Tensor = 0
    aids: dict[str, Any] = field(default_factory=dict)


class CausalLM(SequenceAdapter[PromptPass]):
    """A causal language model of transformers: `model.model` with `layers`, rotary positions and a dynamic cache."""

    family = "causal_lm"
    model_classes = tuple(
        f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}ForCausalLM"
        for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Phi")
    )
    signals = {"input": _ALWAYS | _ATTENTION}
    rest = frozenset({"drop", "defer", "bypass"})
    gates = True
    decodes = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.decoder: Any = model.model
        self.config: Any = model.config
        self.caches: WeakKeyDictionary[Any, PromptCache] = WeakKeyDictionary()  # by the model's own
        self.recorders: dict[int, Recorder] = {}  # by layer
        self.read_layers: frozenset[int] = frozenset()  # that later sites read

    def started(self) -> PromptPass:
        return PromptPass()

    # -- sizes and refusals --------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Any:
        return self.decoder.layers

    @cached_property
    def info(self) -> ModelInfo:
        config = self.config
        tokens = min(_EXAMPLE, config.max_position_embeddings)
        return ModelInfo(self.family, config.num_hidden_layers, config.num_attention_heads, config.hidden_size, tokens)

    def example(self) -> Tensor:
        return torch.zeros(1, self.info.tokens, dtype=torch.long, device="meta")

    def seen(self, trace: Trace) -> list[tuple[Any, float]]:
        return [(torch.zeros(1, trace.text, dtype=torch.long, device="meta"), 1.0)] if trace.text else []

    def cache_bytes(self, tokens: Sequence[float]) -> int:
        config = self.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        entry = 2 * config.num_key_value_heads * head * self.decoder.embed_tokens.weight.element_size()
        return round(sum(tokens) * entry)

    def grids(self) -> tuple[tuple[int, int], ...]:
        return ()

    def gives(self, site: Site) -> frozenset[str]:
        return self.signals[site.where] - (frozenset() if site.layer else _ATTENTION)

    def check(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        super().check(method, sites)
        if windowed(self.config):
            raise PrunelabError("tokens leave decoders of full attention only; set config.sliding_window=None first")
        if (attends := implementation(self.config)) not in ("sdpa", "eager", NAME):
            raise PrunelabError(f"tokens leave models that run sdpa or eager attention, not {attends}")
        if len({site.layer for site in sites}) < len(sites):
            raise PrunelabError(f"{method.name} prunes twice before one layer; a decoder has one site a layer")
        for site in sites if method.rest == "defer" else ():
            if missing := method.requires(site) - _LASTING:
                raise PrunelabError(
                    f"{method.name} reads {', '.join(sorted(map(str, missing)))}, which a model no longer has of"
                    " tokens in its cache when others come back; use rest='drop'"
                )

    def check_plan(self, plan: Plan) -> None:
        super().check_plan(plan)
        if not isinstance(plan.reduce, Gather) or plan.key_bias is not None:
            raise PrunelabError("tokens of a causal language model stay or leave; they are not merged or biased")
        if plan.reduce.outputs == 0:
            raise PrunelabError("the plan leaves no token of the prompt; give a larger budget")

    # -- hooks ---------------------------------------------------------------------------------------------------

    def install(self, application: Application) -> Callable[[], None]:
        removers: list[Callable[[], Any]] = []
        self.recorders = {}
        wanted = application.readings("layer")
        self.read_layers = frozenset(wanted)
        for reading in application.method.observes():
            wanted.setdefault(reading.layer, set())
        sites = {site.layer: site for site in application.sites}
        alone = set(sites) if application.method.rest == "bypass" else set()
        starts = sorted({0, *sites, *(layer + 1 for layer in alone)} & set(range(len(self.blocks))))
        try:
            for layer, site in sites.items():
                if application.method.requires(site) & _ATTENTION:
                    wanted.setdefault(layer - 1, set())
            for layer, names in wanted.items():
                attention = self.blocks[layer].self_attn
                self.recorders[layer], stop = record(attention)
                removers.append(stop)
                for name, module in (("hidden", self.blocks[layer]), ("values", attention.v_proj)):
                    if name in names:
                        removers.append(after(module, keeper(functools.partial(self._seen, layer), name)))
            # before what prunes the cache of the tokens that are left
            removers.append(before(self.decoder, self._begin(application), kwargs=True, first=True))
            removers.append(after(self.decoder, self._end(application, starts)))
            for layer, block in enumerate(self.blocks):
                segment = starts.index(layer) if layer in starts else None
                hook = self._layer(application, layer, segment, sites.get(layer))
                removers.append(before(block, hook, kwargs=True))
                if layer in alone:
                    removers.append(after(block, self._come_back))
        except BaseException:
            run_all(removers)
            raise
        return lambda: run_all(removers)

    def _seen(self, layer: int) -> Seen:
        return self.running.seen.get(layer) or Seen(Tokens())  # while decoding nothing is kept

    def _begin(self, application: Application) -> Callable[..., Any]:
        """Before the decoder: which columns are new, and whose they are. The mask is made anew for every segment."""
        deferring = application.method.rest == "defer"

        def hook(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            refuse_checkpointing(self.model)
            refuse_tracing()
            ids, cache = given.get("input_ids", args[0] if args else None), cache_in(given)
            if fixed(cache):
                raise PrunelabError(FIXED)
            if self.recorders and given.get("output_attentions"):
                raise PrunelabError(UNSHOWN)
            read = given.get("inputs_embeds") if ids is None else ids
            if read is None or read.shape[1] == 0:
                raise PrunelabError("the prompt is empty; give at least one token")
            batch, new = read.shape[:2]
            seen = 0 if cache is None else cache.get_seq_length()
            running = self.running = self.started()
            if seen:
                running.cache = self._known(cache, seen)
                if deferring and new > 1:
                    raise PrunelabError("tokens come back for one new token at a time; give the others one by one")
            else:
                nothing = torch.zeros(batch, 0, dtype=torch.long, device=read.device)
                running.cache = PromptCache(new, nothing[:1], None, nothing)
            known, start = running.cache, running.cache.total
            if start + new > self.config.max_position_embeddings:
                raise PrunelabError(
                    f"{start + new} tokens are more than the model's context of"
                    f" {self.config.max_position_embeddings}; shorten the text"
                )
            positions = given.get("position_ids")
            if positions is None:
                positions = torch.arange(start, start + new, device=read.device).unsqueeze(0)
            known.grow(positions, self._real(given.get("attention_mask"), start, new))
            running.new, running.decoding = new, seen > 0
            running.deciding = deferring or not seen
            aids = {"attention_mask": None, **({"position_ids": positions} if seen else {})}
            return args, given | aids

        return hook

    def _known(self, cache: Any, seen: int) -> PromptCache:
        known = self.caches.get(cache)
        if known is None:
            raise PrunelabError("this cache was filled without the method; run the prompt inside the `with` block")
        if known.gated:
            raise PrunelabError("this prompt was read while its tokens' gates learn; read it again in eval mode")
        if seen != known.held[0].columns.shape[1] or len(cache.layers[0].keys) != len(known.segments):
            raise PrunelabError("this cache was changed since; a pruned cache grows, but is not cropped or expanded")
        return known

    def _real(self, mask: Tensor | None, start: int, new: int) -> Tensor | None:
        """The new columns [B, M] that are no padding, None where all are."""
        if mask is None or mask.device.type == "meta":
            return None
        if mask.dim() != 2 or mask.shape[1] != start + new:
            raise PrunelabError(
                "tokens are pruned with a growing cache and a mask of one column a token so far, not one of shape"
                f" {tuple(mask.shape)}"
            )
        real = mask[:, start:].bool()
        reason = "samples must end with a token: pad on the left, and leave no sample empty"
        if new == 1:  # while decoding nobody looks before the pass ends
            self.running.checks.expect(real.all(), reason)
            return None
        ends, whole = torch.stack([real[:, -1].all(), real.all()]).tolist()
        if not ends:
            raise PrunelabError(reason)
        return None if whole else real

    def _end(self, application: Application, starts: Sequence[int]) -> Callable[..., Any]:
        """Behind the decoder: the method may look, and what came back is not what was asked for."""

        def hook(module: Any, args: Any, output: Any) -> Any:
            running = self.running
            if running.decoding or application.method.observes_prompt:
                prompt = torch.arange(running.cache.prompt, device=output.last_hidden_state.device)
                prunable = (prompt < running.cache.prompt - 1).expand(len(output.last_hidden_state), -1)
                if running.cache.real is not None:
                    prunable = prunable & running.cache.real[:, : running.cache.prompt]
                self.show(application, prunable, functools.partial(self._newest_row, starts))
            self.end(module, args, output)
            for recorder in self.recorders.values():
                recorder.clear()
            if running.decoding and output.last_hidden_state.shape[1] > running.new:
                output.last_hidden_state = output.last_hidden_state[:, -running.new :]
            return output

        return hook

    def _newest_row(self, starts: Sequence[int], layer: int) -> Tensor:
        """[B, H, N] the attention of the newest token to the tokens of the prompt; the layer lost those at zero."""
        cache = self.running.cache
        held = cache.held[sum(start <= layer for start in starts) - 1]
        seen = newest_row(self.recorders[layer])
        out = seen.new_zeros(*seen.shape[:2], cache.total)
        return out.scatter_add(2, held.columns.unsqueeze(1).expand_as(seen), seen)[..., : cache.prompt]

    def _layer(
        self, application: Application, layer: int, segment: int | None, site: Site | None
    ) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            x, cache, running = args[0], cache_in(given), self.running
            if layer == 0 and not running.decoding:
                application.trace.begin(len(x))
                real = running.cache.real
                application.trace.read(x.shape[0] * x.shape[1] if real is None else real.sum())
                if cache is not None:
                    self.caches[cache] = running.cache
                    running.cache.follow(cache)
            if segment is not None:
                x = self._open(application, segment, site, x)
            if layer in self.read_layers and not running.decoding:
                running.seen[layer] = Seen(running.tokens)
            for part in ("attention", "mlp"):
                application.trace.add(part, layer, running.counted)
            return (x, *args[1:]), given | running.aids

        return hook

    # -- a segment of layers -------------------------------------------------------------------------------------

    def _open(self, application: Application, segment: int, site: Site | None, x: Tensor) -> Tensor:
        """What goes into a segment [B, R, D], of what came out of the one before; position table and mask of it."""
        running, cache = self.running, self.running.cache
        total, running.segment = cache.total, segment
        if segment == 0:
            columns = torch.arange(total, device=x.device).expand(len(x), -1)
            running.tokens = Tokens(origin=columns, valid=cache.real)
            fresh = None if cache.real is None else cache.real[:, -running.new :]
            running.rows = Entries(columns[:, -running.new :], fresh)
        if site is not None and running.deciding:
            x = self._cut(application, segment, site, x)
        held = cache.enter(segment, running.rows)
        positions = cache.positions.expand(len(x), -1).gather(1, running.rows.columns)
        running.aids = {
            "position_embeddings": self.decoder.rotary_emb(x, positions),
            "position_ids": positions,
            "attention_mask": self._mask(held, x),
        }
        running.counted = self._computed()
        return x

    def _computed(self) -> int | Tensor:
        """How many of the rows are tokens of the prompt."""
        running, rows = self.running, self.running.rows
        if not running.decoding and rows.valid is None:
            return rows.columns.numel()
        return (rows.real() & (rows.columns < running.cache.prompt)).sum()

    def _cut(self, application: Application, segment: int, site: Site, x: Tensor) -> Tensor:
        """Carry out the method's plan: what goes on of the active tokens, among it what comes back."""
        running, cache = self.running, self.running.cache
        seen = running.tokens.origin if running.decoding else x
        assert seen is not None
        plan, signals = self.decide(application, site, seen)
        assert isinstance(plan.reduce, Gather)
        plan = replace(plan, reduce=in_order(plan.reduce))
        if plan.key_bias is not None:
            cache.gated = True
        if plan.rest == "defer":
            cache.defer(running.rows, x)
        if plan.rest == "bypass":
            self.set_aside(application, site, plan, x, "rows")
        else:
            self.follow(application, site, plan, seen)
        columns, valid = running.tokens.origin, running.tokens.valid
        assert columns is not None
        reason = f"{application.method.name} left out the newest token, which the model cannot"
        running.checks.expect((columns[:, -1] == cache.total - 1).all(), reason)
        if not running.decoding:
            running.rows = Entries(columns, valid)
            return application.method.refine(site, plan.reduce.apply(x), signals, plan)
        assert cache.waiting is not None
        waits = (cache.segments.gather(1, columns) == segment) & (columns < cache.total - 1)
        back = padded_first(selection.compact(waits if valid is None else waits & valid))
        assert isinstance(back, Gather)
        came = Entries(back.apply(columns), back.valid)
        running.rows = came.joined(Entries(columns[:, -1:], None))
        return torch.cat([take(cache.waiting, came.columns), x[:, -1:]], 1)

    def _come_back(self, module: Any, args: Any, output: Any) -> Any:
        """Behind a layer that only some tokens went through."""
        if self.running.aside is None:
            return None
        x = self.together(output[0] if isinstance(output, tuple) else output)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _mask(self, held: Entries, x: Tensor) -> Tensor | None:
        """Mask of the rows at hand in the form that the model's attention takes; None where causal order says it."""
        running, total = self.running, self.running.cache.total
        rows, columns, valid, active = running.rows, running.tokens.origin, running.tokens.valid, None
        assert columns is not None
        if running.decoding and running.deciding and (valid is not None or columns.shape[1] < total):
            active = Entries(columns, valid).of(torch.ones_like(columns), total).bool()
        eager = self.config._attn_implementation == "eager"
        plain = rows.columns.shape[1] in (1, held.columns.shape[1])  # one query, or all of the prompt
        bias = running.tokens.bias
        if plain and active is None and held.valid is None and not eager and bias is None:
            return None
        seen = visible(rows, held, active)
        if not eager and bias is None:
            return seen
        mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        return mask if bias is None else mask + bias[:, None, None, :].to(x.dtype)

    # -- signals -------------------------------------------------------------------------------------------------

    def view(self, site: Site, x: Tensor) -> View:
        """In a decoding step x is the active tokens' columns [B, U] alone, since most of them have no hidden state."""
        view, cache = super().view(site, x), self.running.cache
        assert view.indices is not None
        last = cache.prompt - 1  # assumption: the prompt's last token stays like the generated ones that follow it
        prunable = view.prunable & (view.indices < last)
        always = cache.total - last
        units = x.shape[1] - always if view.valid is None else int(prunable.sum(1).max())
        return replace(view, prunable=prunable, units=units)

    def readable(self, site: Site, reading: Reading) -> str | None:
        if reading.where == "tower":
            return "this model has no image encoder"
        return self.earlier(site, reading, ALONE - {"cls_row"})

    def read(self, site: Site, x: Tensor, reading: Reading) -> Tensor:
        seen, layer = self.running.seen[reading.layer], self.blocks[reading.layer]
        known = sources(seen, self.recorders[reading.layer], layer.self_attn.head_dim)
        return seen.now(known[reading.name](), reading.name)

    def sources(self, site: Site, x: Tensor) -> Mapping[str, Callable[[], Tensor]]:
        seen = self.recorders.get(site.layer - 1)
        if seen is None:
            return {}
        running = self.running
        newest = torch.full((len(x), 1), running.rows.columns.shape[1] - 1, device=x.device)
        row = functools.partial(seen.weights, newest)
        if not running.decoding:
            went = running.passed.get(site.layer - 1)
            valid = running.tokens.valid if went is None else went.valid
            known: dict[str, Callable[[], Tensor]] = {
                "queries": seen.shown,
                "keys": lambda: seen.keys,
                "attention_logits": seen.logits,
                "attention": seen.weights,
                "last_row": lambda: row().squeeze(2),
                "received": lambda: received(seen, valid),
            }
            return known if went is None else behind_a_bypass(known, seen, went, x.shape[1])
        held, columns = running.cache.held[running.segment - 1], running.tokens.origin
        assert columns is not None
        order = torch.arange(held.columns.shape[1], device=x.device)
        entry = held.of(order, running.cache.total).gather(1, columns).unsqueeze(1)  # [B, 1, U]
        return {
            "keys": lambda: take(seen.keys, entry.expand(-1, seen.keys.shape[1], -1)),
            "last_row": lambda: row().squeeze(2).gather(2, entry.expand(-1, self.info.heads, -1)),
        }
