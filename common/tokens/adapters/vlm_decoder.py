"""The decoder of an image or video language model, while it reads its prompt and while it writes: sequence, positions,
masks and caches follow the tokens that are left."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunelab.common.core.attention_interface import Recorder, cache_in, cache_name
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import refuse_checkpointing, refuse_tracing
from prunelab.common.core.plan import Gather, Site, take
from prunelab.common.tokens.adapters.passes import Application, Seen, Tokens, Trace, padding_behind, padding_in_front
from prunelab.common.tokens.adapters.recorded import FIXED, UNSHOWN, fixed, last_index, newest_row, row
from prunelab.common.tokens.adapters.vlm_attribution import Attribution, spread
from prunelab.common.tokens.adapters.vlm_features import FeatureSide
from prunelab.common.tokens.adapters.vlm_prompt import (
    SHOWN,
    CachedPrompt,
    Held,
    closed,
    disagreement,
    following,
    heaviest,
)


class DecoderSide(FeatureSide):
    """What happens in the decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.decoder: Any = getattr(self.body, self.decoders)
        self.recorders: dict[int, Recorder] = {}  # by layer
        self.read_layers: frozenset[int] = frozenset()  # that later sites read
        self.prompts: WeakKeyDictionary[Any, CachedPrompt] = WeakKeyDictionary()  # by cache

    @property
    def carries(self) -> int:
        """Layers behind which something is added to visual tokens; see `Prefill`."""
        return 0

    def axes(self, positions: Tensor) -> Tensor:
        """Position ids as the decoder's rotary table reads them."""
        return positions

    @abstractmethod
    def shaped(self, given: Mapping[str, Any]) -> Any:
        """The shapes of a prompt given as the model's forward takes it, for one image or video."""

    # -- a pass begins -------------------------------------------------------------------------------------------------

    def _noting_labels(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, in whose place this is, since adapters of `peft` call it past the hooks."""

        @functools.wraps(forward)
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._own.labels = kwargs.get("labels") is not None
            return forward(*args, **kwargs)

        return noting

    def _refuse_labels(self) -> None:
        if getattr(self._own, "labels", False):
            raise PrunelabError(
                "labels stand beside the tokens of the whole prompt, of which some left; take the loss of the logits"
                " yourself, or train with gates, which keep all"
            )

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A new pass: which tokens of the input are visual."""
        refuse_checkpointing(self.model)
        refuse_tracing()
        self._own.padding, self._own.kinds = kwargs.get("attention_mask"), kwargs.get("token_type_ids")
        self._own.given, self._own.numbered = kwargs, kwargs.get("position_ids") is not None
        self._own.prefix = self.prefixes and self._own.kinds is not None
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        embeddings: Any = kwargs.get("inputs_embeds")
        shown, given = SHOWN.get(), kwargs.get("mm_encoder_outputs") or {}
        self.encoded = {m: e for m, e in self.encoded.items() if shown is not None or e.gave(given.get(m))}
        running = self.running = self.started()
        for modality, name in self.tokens.items():
            token = getattr(self.config, name)
            if shown is not None:
                running.visual[modality] = shown if modality in self.encoded else torch.zeros_like(shown)
            elif ids is not None:
                running.visual[modality] = ids == token
            else:
                like = module.get_input_embeddings()(torch.tensor(token, device=embeddings.device))
                running.visual[modality] = (embeddings == like).all(-1)

    def _enter(self, application: Application) -> Callable[..., Any]:
        early = 0 if application.method.rest == "bypass" else 1  # who passes by a layer comes to it
        sites = [s for s in application.sites if s.where != "input" or s.layer < early]

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if self.prefixes:  # the class makes masks of its own, which `_mask` takes the place of
                kwargs = kwargs | {"attention_mask": self._own.padding}
            cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
            if fixed(cache) or isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
                raise PrunelabError(FIXED)
            if self.recorders and kwargs.get("output_attentions"):
                raise PrunelabError(UNSHOWN)
            if cache is not None and cache.get_seq_length() > 0:
                return args, kwargs | self._resume(cache, kwargs)
            aids = self._prefill(application, sites, kwargs)
            if self.running.changed:
                self._refuse_labels()
            return args, kwargs | aids

        return hook

    # -- prefill -------------------------------------------------------------------------------------------------------

    def _counts(self) -> list[int]:
        """How many visual tokens each sample of the prompt has; `modality` is said on the way."""
        running = self.running
        if len(running.anywhere) == 1 and len(self.encoded) == 1:  # the model has seen to it that these are as many
            (running.modality, encoded), *_ = self.encoded.items()
            return [sum(encoded.lengths)]
        counts = torch.stack([visual.sum(1) for visual in running.visual.values()]).tolist()
        shown = [modality for modality, result in zip(running.visual, counts, strict=True) if any(result)]
        running.modality = shown[0] if len(shown) == 1 else None
        return [sum(result) for result in zip(*counts, strict=True)]

    def _prefill(self, application: Application, sites: Sequence[Site], given: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments after everything that happens before its first layer."""
        x, mask, positions = given["inputs_embeds"], given.get("attention_mask"), given.get("position_ids")
        running = self.running
        visual = running.anywhere
        if self._own.prefix and bool(self._own.kinds.any()):
            raise PrunelabError(
                "a prompt that sees all of itself is pruned without what shall follow it; leave suffix and labels out"
            )
        counts = self._counts()
        if not any(counts):
            raise disagreement(0, 0)
        valid = None if mask is None or x.device.type == "meta" or bool(mask.all()) else mask.bool()
        self._tell(application.trace, counts, x.shape[0] * x.shape[1] if valid is None else valid.sum())
        if valid is None and len(set(counts)) > 1:
            valid = torch.ones_like(visual)
        batch, total = x.shape[:2]
        running.encoded, running.tokens = self.encoded, Tokens(valid=valid)
        running.left = mask is None or valid is None or bool(mask[:, -1].all())
        running.prunable = visual.to(x.device)
        running.text = total - max(counts)
        running.source = torch.arange(total, device=x.device).expand(batch, -1)
        positions = running.source if positions is None else positions
        running.positions = positions.expand(*positions.shape[:-2], batch, -1)
        end = following(running.positions, valid)
        running.shift = torch.zeros_like(end)
        application.trace.attribution = running.attribution = Attribution(running.encoded, running.visual, [])
        for encoded in running.encoded.values():
            running.state.update(encoded.seen.state)
            running.checks.include(encoded.seen.checks)
            running.kept += encoded.seen.kept
        if running.kept:
            application.trace.kept = running.kept
        for site in sites:
            if site.where in ("encoded", "projected") or (site.where == "tower" and site.index == 0):
                x = self._project(application, site, x)
            elif site.where != "tower":
                x = self._cut(application, site, x)
        running.cached = CachedPrompt([self._held(0)], visual, end)
        if not sites:
            return {}
        seen = running.tokens.valid
        if seen is None and x.device.type != "meta":  # a mask of ones: without, gaps between positions would be borders
            seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return {
            "inputs_embeds": x,
            "position_ids": running.positions,
            "attention_mask": None if seen is None else seen.long(),
        }

    def _tell(self, trace: Trace, counts: Sequence[int], tokens: int | Tensor) -> None:
        """Note for reports what was read: so many visual tokens a sample, of so many tokens together."""
        given, self._own.given = self._own.given, {}
        trace.read(tokens - sum(counts))
        modality = self.running.modality
        if modality is None or SHOWN.get() is not None or len(set(counts)) > 1:
            return
        names = inspect.signature(getattr(type(self.body), f"get_{modality}_features")).parameters
        pixels = {name: given[name] for name in names if isinstance(given.get(name), Tensor)}
        if not pixels or any(len(value) % len(counts) for value in pixels.values()):
            return
        size: list[Any] = [modality, counts[0]]
        for name, value in pixels.items():
            samples = value.unflatten(0, (len(counts), -1))
            pixels[name] = samples[0]
            size.append(tuple(samples.shape[1:]))
            if not value.is_floating_point():  # sizes of images, which the model itself looks at
                values = samples.tolist()
                if any(other != values[0] for other in values):
                    return
                size.append(str(values[0]))
        key = tuple(size)
        if key not in trace.inputs:
            token: int = getattr(self.config, self.tokens[modality])
            pixels |= {"input_ids": torch.full((1, counts[0] + 1), token)}
            pixels["input_ids"][:, -1] += 1
            trace.saw(key, 0, self.shaped(pixels))
        trace.saw(key, len(counts))

    def _held(self, layer: int, index: Tensor | None = None) -> Held:
        """What the layers from this one on hold of the tokens at hand, which are entries [B, K] of the layers
        before."""
        running = self.running
        tokens = running.tokens
        return Held(layer, running.source, tokens.valid, running.shift, tokens.bias, index)

    def _cut(self, application: Application, site: Site, x: Tensor) -> Tensor:
        """Carry out the method's plan on the sequence x [B, N, D]; everything that goes along with it follows."""
        plan, signals = self.decide(application, site, x)
        plan = padding_in_front(plan) if self.running.left else padding_behind(plan)
        self.running.changed |= plan.reduce.outputs != x.shape[1]
        if plan.rest == "bypass":
            self.set_aside(application, site, plan, x, "prunable", "source", "positions", "rows", "groups")
        else:
            self.follow(application, site, plan, x)
        y = application.method.refine(site, plan.reduce.apply(x), signals, plan)
        running, source, units = self.running, heaviest(plan.reduce, x.shape[1]), x.shape[1]
        valid = running.tokens.valid
        running.prunable, running.source = running.prunable.gather(1, source), running.source.gather(1, source)
        running.rows = None if running.rows is None else running.rows.gather(1, source)
        running.carried = None if running.carried is None else plan.reduce.apply(running.carried)
        running.groups = None if running.groups is None else running.groups.gather(1, source)
        kept = running.positions.gather(-1, source.expand(*running.positions.shape[:-1], -1))
        if valid is not None:
            running.prunable = running.prunable & valid
        back = functools.partial(spread, plan.reduce, units=units)
        running.attribution.steps.append((site, running.prunable, back))
        if plan.positions == "renumber":
            kept = closed(kept, valid)
            running.shift = running.shift + following(running.positions, signals.valid) - following(kept, valid)
        running.positions = kept
        running.taken = plan.reduce.index if isinstance(plan.reduce, Gather) else None
        return y

    def _layer(self, application: Application, layer: int) -> Callable[..., Any]:
        early = 0 if application.method.rest == "bypass" else 1
        sites = [s for s in application.sites if s.where == "input" and s.layer == layer and layer >= early]

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache, running = cache_in(kwargs), self.running
            if layer == 0:
                running.decoding = cache is not None and cache.get_seq_length() > 0
                if cache is not None and not running.decoding:
                    self.prompts[cache] = running.cached
                    running.cached.follow(cache)
            if running.decoding:
                return args, kwargs | self._recall(layer, args[0])
            x = args[0]
            for site in sites:
                x = self._cut(application, site, x)
                running.cached.held.append(self._held(layer, running.taken))
                if running.changed and running.aside is None:
                    self._refuse_labels()
            if layer == 0 and -1 in self.read_layers:
                running.seen[-1] = Seen(running.tokens, {"hidden": x})
            if layer in self.read_layers:
                running.seen[layer] = Seen(running.tokens, {"visual": running.prunable})
            self._count_tokens(application, layer, x)
            if len(running.cached.held) > 1 or running.tokens.bias is not None or self._own.prefix:
                kwargs = kwargs | self._aids(x, kwargs)
            return (x, *args[1:]), kwargs

        return hook

    def _aids(self, x: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """Position table and mask of the tokens at hand, in place of those of the whole sequence."""
        ids, positions = given.get("position_ids"), self.running.positions
        return {
            "position_embeddings": self.decoder.rotary_emb(x, self.axes(positions)),
            "position_ids": None if ids is None else positions.view(-1, *positions.shape[-2:])[0],
            "attention_mask": self._mask(self.running.tokens.valid, x, self.running.tokens.bias),
        }

    def _come_back(self, layer: int) -> Callable[..., Any]:
        """Behind a layer that only some tokens went through."""

        def hook(module: Any, args: Any, output: Any) -> Any:
            if self.running.aside is None:
                return None
            x = self.together(output[0] if isinstance(output, tuple) else output)
            self.running.cached.held.append(self._held(layer + 1))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    def _give(self, layer: int) -> Callable[..., Any]:
        """Behind one of the first layers: what is carried for it is added to the tokens at hand."""

        def hook(module: Any, args: Any, output: Any) -> Any:
            running = self.running
            if running.decoding or running.carried is None:
                return None
            x = output[0] if isinstance(output, tuple) else output
            x = x + running.carried[..., layer * x.shape[-1] : (layer + 1) * x.shape[-1]]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    def _mask(self, valid: Tensor | None, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Mask [B, 1, N, K] in the form that the decoder's attention takes, for queries x [B, N, D], keys valid [B, K],
        and their bias: causal, or of a prompt that sees all of itself."""
        eager = self.decoder.config._attn_implementation == "eager"
        rows = x.shape[1]
        whole = self._own.prefix and not self.running.decoding
        if valid is None:
            if not eager and bias is None and not whole:
                return None
            valid = torch.ones(x.shape[:2] if bias is None else bias.shape, dtype=torch.bool, device=x.device)
        keys = valid.shape[1]
        causal = torch.ones(rows, keys, dtype=torch.bool, device=x.device).tril(keys - rows)
        causal = torch.ones_like(causal) if whole else causal
        own = torch.zeros_like(causal).fill_diagonal_(True) if rows == keys else torch.zeros_like(causal)
        seen = (causal & valid[:, None, None, :]) | own  # padding sees itself, so that no row is empty
        if not eager and bias is None:
            return seen
        mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        return mask if bias is None else mask + bias[:, None, None, :].to(x.dtype)

    def _count_tokens(self, application: Application, layer: int, x: Tensor) -> None:
        if layer == 0:
            application.trace.begin(x.shape[0])
        for part in ("attention", "mlp"):
            application.trace.add(part, layer, self.running.tokens.count(x))

    def _trim(self, application: Application) -> Callable[..., None]:
        """Behind the decoder, once the prompt is read: what caches still hold of tokens that left later goes, where the
        method says so."""
        first = application.method.trims

        def hook(module: Any, args: Any, output: Any) -> None:
            running, cache = self.running, getattr(output, cache_name(), None)
            if first is None or running.decoding or cache is None:
                return
            held, final = running.cached.held, running.cached.held[-1]
            entries: Tensor | None = None  # of each segment's layers, from the last one back
            end = len(self.blocks)
            for segment in reversed(held):
                for layer in range(max(first, segment.layer), end):
                    if entries is not None:
                        kept = cache.layers[layer]
                        kept.keys, kept.values = (
                            take(x, entries.unsqueeze(1).expand(-1, x.shape[1], -1)) for x in (kept.keys, kept.values)
                        )
                end = segment.layer
                if end <= first or segment.index is None:
                    break
                entries = segment.index if entries is None else segment.index.gather(1, entries)
            reached = max(first, end)
            if final.layer > reached:
                running.cached.held = [*(h for h in held if h.layer < reached), replace(final, layer=reached)]

        return hook

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _resume(self, cache: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments for tokens behind a pruned prompt: the model masks and numbers them by the prompt as
        it was, the first layer needs them by what it holds of it."""
        running = self.running
        if cache not in self.prompts:
            raise PrunelabError("this cache was filled without the method; run the prompt inside the `with` block")
        running.cached = self.prompts[cache]
        first, x = running.cached.at(0), given["inputs_embeds"]
        mask = given.get("attention_mask")  # classes that number by the cache's entries miss those that left
        positions = given.get("position_ids") if self._own.numbered else None
        written = cache.get_seq_length() - first.source.shape[1]  # tokens behind the prompt so far
        repeated = 0
        if x.shape[1] > 1 and positions is not None:
            # who counts the cache's entries, as `generate` does, gives again as many tokens as were left out
            end = running.cached.end  # with several axes the text's own number may stand in front, or be left out
            number = end if positions.shape[:-1] == end.shape else end[-1]
            repeated = int((number + written - positions[..., 0]).flatten()[0])
            if not 0 <= repeated < x.shape[1]:
                raise PrunelabError(
                    "these tokens do not follow the text in the cache; give those behind it, with their positions in"
                    " the whole text or none"
                )
            if repeated:
                x, running.cached.renumbers = x[:, repeated:], True
        if x.shape[1] > 1 and any(bool(visual[:, repeated:].any()) for visual in running.visual.values()):
            raise PrunelabError("visual tokens come behind a cached prompt; give the whole prompt in one piece")
        later = written + x.shape[1]  # these included
        running.later = first.source.new_ones(len(x), later) if mask is None else mask[:, mask.shape[1] - later :]
        if positions is None or running.cached.renumbers:
            positions = running.cached.end.unsqueeze(-1) + torch.arange(later - x.shape[1], later, device=x.device)
        running.now = positions
        running.whole = mask is None or (first.valid is None and x.shape[1] == 1 and bool(running.later.all()))
        if mask is not None or first.valid is not None:
            mask = torch.cat([self._real(first).to(running.later.dtype), running.later], 1)
        aids = {"attention_mask": mask, "position_ids": positions - first.shift.unsqueeze(-1)}
        return {**aids, "inputs_embeds": x} if repeated else aids

    def _recall(self, layer: int, x: Tensor) -> dict[str, Any]:
        """What a later layer that holds less of the prompt needs in place of that."""
        running, first, held = self.running, self.running.cached.at(0), self.running.cached.at(layer)
        if held is first and held.bias is None:
            return {}
        full = held.valid is None and held.bias is None and x.shape[1] == 1 and running.whole
        valid = None if full else torch.cat([self._real(held), running.later.bool()], 1)
        bias = None if held.bias is None else nn.functional.pad(held.bias, (0, running.later.shape[1]))
        aids: dict[str, Any] = {"attention_mask": self._mask(valid, x, bias)}
        if held.shift is not first.shift:
            positions = running.now - held.shift.unsqueeze(-1)
            aids["position_embeddings"] = self.decoder.rotary_emb(x, self.axes(positions))
        return aids

    def _real(self, held: Held) -> Tensor:
        return torch.ones_like(held.source, dtype=torch.bool) if held.valid is None else held.valid

    # -- observation ---------------------------------------------------------------------------------------------------

    def _observe(self, application: Application) -> Callable[..., None]:
        """Behind a step of decoding: what the method is shown of it."""

        def hook(module: Any, args: Any, output: Any) -> None:
            if self.running.decoding or application.method.observes_prompt:
                self.show(application, self.running.cached.visual, self._newest_row)

        return hook

    def _newest_row(self, layer: int) -> Tensor:
        """[B, H, N] the attention of the newest token to the tokens of the prompt; the layer lost those at zero."""
        cached, recorder = self.running.cached, self.recorders[layer]
        held = cached.at(layer)
        source = held.source
        # of a prompt padding may stand at the end
        seen = newest_row(recorder) if self.running.decoding else row(recorder, last_index(source, held.valid))
        seen = seen[..., : source.shape[1]]
        out = seen.new_zeros(*seen.shape[:2], cached.visual.shape[1])
        return out.scatter_add(2, source.unsqueeze(1).expand_as(seen), seen)
