"""What image and video language models share: visual tokens that a decoder reads among its text.

A unit is a token of the decoder's sequence; only visual ones are prunable. Sites:

- `tower`: what enters a layer of the image encoder (CLIP, SigLIP), crops as the batch; who leaves there is gone;
- `encoded`: the features of one image or video alone, before the projector, which only sees what goes on; with the
  class token of every crop, where the site says so;
- `projected`: the same behind the projector, before pooling and packing;
- `packed`: the whole sequence the decoder is about to read;
- `input` of a decoder layer: the sequence there, with the attention of the layer before it at hand.

The prompt, `generate` and the model's forward stay as they are. What leaves the sequence leaves the position table, the
masks and the caches of that and all later layers, at prefill and while decoding. Padding is kept at the front, so that
the last token is last in every sample. A sequence is causal in the order of the plan's outputs.

What a plan's `positions` mean: `original` leaves gaps in the numbering, `renumber` numbers the outputs one after the
other; where a position has three axes, it closes up the numbers that no token uses any more on any of them. A mixture
of tokens has the position of the heaviest of them. What a plan for `projected` gives no `layout` is packed by the
model's own rule, newline tokens behind the rows that still hold a token included; with a layout the outputs come in the
plan's order, with newlines rebuilt from it, or none where all places are -1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunelab.common.core.attention_interface import cache_in, record
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before, refuse_checkpointing, refuse_tracing, run_all
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.base import Application, Seen, Tokens, padding_behind, padding_in_front
from prunelab.common.tokens.adapters.recorded import (
    ALONE,
    FIXED,
    UNSHOWN,
    behind,
    fixed,
    last_index,
    newest_row,
    received,
    row,
    sources,
    windowed,
)
from prunelab.common.tokens.adapters.vlm_attribution import Attribution, spread
from prunelab.common.tokens.adapters.vlm_prompt import (
    SHOWN,
    CachedPrompt,
    Held,
    Prompt,
    closed,
    disagreement,
    following,
    heaviest,
)
from prunelab.common.tokens.adapters.vlm_tower import FEATURES
from prunelab.common.tokens.adapters.vlm_vision import _INSIDE, VisionSide
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import View

_ALWAYS = frozenset({"hidden", "sizes"})
_DECODER = frozenset({"queries", "keys", "attention_logits", "attention", "last_row", "received"})
_AHEAD = frozenset({"coming_row"})
_ANYWHERE = _AHEAD | {"normed"}  # in the decoder, before its first layer, too
_EARLIER = (ALONE - {"cls_row"}) | {"attention"}


class VisionLanguage(VisionSide):
    """A model of transformers with `model.language_model`, a decoder that reads visual tokens among its text."""

    positions = frozenset({"original", "renumber"})
    rest = frozenset({"drop", "bypass"})
    gates = True
    decodes = True
    embeddings = True
    signals = {
        "tower": _ALWAYS | _INSIDE,
        "encoded": _ALWAYS | FEATURES,
        "projected": _ALWAYS | FEATURES | {"text"},
        "packed": _ALWAYS | FEATURES,
        "input": _ALWAYS | _DECODER | _ANYWHERE,
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.decoder: Any = self.body.language_model
        self.read_layers: frozenset[int] = frozenset()  # of the decoder, that later sites read
        self.prompts: WeakKeyDictionary[Any, CachedPrompt] = WeakKeyDictionary()  # by cache

    def axes(self, positions: Tensor) -> Tensor:
        """Position ids as the decoder's rotary table reads them."""
        return positions

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """What else the model's processor gives beside the token ids [B, N]."""
        return {}

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Any:
        return self.decoder.layers

    @cached_property
    def info(self) -> ModelInfo:
        config, prompt = self.decoder.config, self.example()
        return ModelInfo(
            family=self.family,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            width=config.hidden_size,
            tokens=prompt.text + self.visual_tokens(prompt),
            grid=self.grid(),
            tower=self.tower_info,
        )

    def visual_tokens(self, prompt: Prompt) -> int:
        """Visual tokens of a prompt."""
        height, width = self.grid()
        counts = self.counts(prompt.modality, prompt.pixels)
        patches = [torch.empty(crops, height * width, 1, device="meta") for crops in counts]
        return sum(map(len, self.packing(prompt.modality, prompt.pixels)(patches)))

    def example(self) -> Prompt:
        return self.prompt()

    def prompt(self, frames: int = 0, text: int | None = None) -> Prompt:
        """A prompt by its shapes, with one standard image, or with a video of so many frames."""
        length = self.text_length() if text is None else text
        if not frames:
            return Prompt(self.pixels(), length)
        if "video" not in self.tokens:
            raise PrunelabError(f"{self.family} reads no videos; leave `frames` out")
        return Prompt(self.video(frames), length, "video")

    def shaped(self, given: Mapping[str, Any]) -> Prompt:
        """The shapes of a prompt given as the model's forward takes it, for one image or video."""
        modality = "video" if "pixel_values_videos" in given else "image"
        names = inspect.signature(getattr(type(self.body), f"get_{modality}_features")).parameters
        visual = int((given["input_ids"] == getattr(self.config, self.tokens[modality])).sum())
        pixels = {name: value for name, value in given.items() if name in names}
        return Prompt(pixels, given["input_ids"].shape[1] - visual, modality).to("meta")

    def text_length(self) -> int:
        """Text tokens of the standard prompt, within what the decoder has positions for."""
        return min(64, self.decoder.config.max_position_embeddings // 16)

    def cache_bytes(self, tokens: Sequence[float]) -> int:
        config = self.decoder.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        entry = 2 * config.num_key_value_heads * head * self.decoder.embed_tokens.weight.element_size()
        return round(sum(tokens) * entry)

    # -- refusals ------------------------------------------------------------------------------------------------

    def gives(self, site: Site) -> frozenset[str]:
        known = self.signals[site.where]
        if site.where == "input":
            return known if site.layer else known - _DECODER
        if site.where == "tower" and not site.layer:
            known = known - _INSIDE
        if not self.tower():
            known = known - FEATURES
        return known if self.class_token else known - {"cls_row"}

    def readable(self, site: Site, reading: Reading) -> str | None:
        if (reading.name == "attention") != (reading.rows == "text"):
            return "of other layers, attention is read by the rows of the text"
        if reading.where == "layer":
            if site.where in ("tower", "encoded", "projected", "packed"):
                return "no layer of the decoder has run there"
            return self.earlier(site, reading, _EARLIER)
        return self.readable_of_tower(site, reading)

    def read(self, site: Site, x: Tensor, reading: Reading) -> Tensor:
        if reading.where != "layer":
            return self._from_tower(reading, x)
        seen, layer = self.running.seen[reading.layer], self.blocks[reading.layer]
        if reading.layer < 0:
            return seen.now(seen.kept["hidden"], "hidden")
        text = behind(self.running.anywhere) if reading.rows else 0
        known = sources(seen, self.recorders[reading.layer], layer.self_attn.head_dim, text)
        return seen.now(known[reading.name](), reading.name)

    def check(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        super().check(method, sites)
        places = {site.where for site in sites}
        self.check_encoder(method, sites)
        if method.rest == "bypass" and places - {"input"}:
            raise PrunelabError(f"{method.name}: tokens can pass by a layer of the decoder at its `input` alone")
        if windowed(self.decoder.config):
            raise PrunelabError(
                f"{self.family}: tokens leave decoders of full attention only, and this one's layers see windows"
                " of the text; set the text config's sliding_window=None first"
            )
        layers = [site.layer for site in sites if site.where == "input"]
        if len(set(layers)) < len(layers):
            raise PrunelabError(f"{method.name} prunes twice before one layer; a decoder has one site a layer")

    def check_plan(self, plan: Plan) -> None:
        super().check_plan(plan if plan.layout is None else replace(plan, layout=None))
        if plan.reduce.outputs == 0:
            raise PrunelabError("the plan leaves no token of the prompt; give a larger budget")

    # -- hooks ---------------------------------------------------------------------------------------------------

    def install(self, application: Application) -> Callable[[], None]:
        removers: list[Callable[[], Any]] = []
        self.recorders, self.tower_recorders, self.encoded = {}, {}, {}
        try:
            for stop in self._watch_tower(application):
                removers.append(stop)
            wanted = application.readings("layer")
            self.read_layers = frozenset(wanted)
            for reading in application.method.observes():
                wanted.setdefault(reading.layer, set())
            for site in application.sites:
                if site.where == "input" and application.method.requires(site) & _DECODER:
                    wanted.setdefault(site.layer - 1, set())
                if application.method.requires(site) & _AHEAD:
                    wanted.setdefault(site.layer, set())
            for layer, names in wanted.items():
                self._record(layer, names, removers)
            projector: Any = getattr(self.body, "multi_modal_projector", None)
            if projector is not None:
                removers.append(after(projector, self._keep_features))
            for site in application.sites:
                if site.where == "encoded":
                    removers.append(before(projector, self._decide_encoded(application, site)))
            for modality in self.tokens:
                removers.append(self._watch_encoder(modality))
            removers.append(self._watch_placeholders())
            removers.append(before(self.model, self._note_labels, kwargs=True))
            removers.append(before(self.body, self._begin, kwargs=True))
            # before what prunes the cache of the tokens that are left
            removers.append(before(self.decoder, self._enter(application), kwargs=True, first=True))
            removers.append(after(self.decoder, self._observe(application)))
            removers.append(after(self.decoder, self.end))
            for layer, block in enumerate(self.blocks):
                removers.append(before(block, self._layer(application, layer), kwargs=True))
                if application.method.rest == "bypass" and any(site.layer == layer for site in application.sites):
                    removers.append(after(block, self._come_back(layer)))
        except BaseException:
            run_all(removers)
            raise
        return lambda: run_all(removers)

    def _record(self, layer: int, names: set[str], removers: list[Callable[[], Any]]) -> None:
        if layer < 0:  # what enters the first, which its hook keeps
            return
        attention = self.blocks[layer].self_attn
        self.recorders[layer], stop = record(attention)
        removers.append(stop)
        for name, module in (("hidden", self.blocks[layer]), ("values", attention.v_proj)):
            if name in names:
                removers.append(after(module, self._keep(layer, name)))

    def _keep(self, layer: int, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if not self.running.decoding:
                self.running.seen[layer].kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _note_labels(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._own.labels = kwargs.get("labels") is not None

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

    # -- prefill -------------------------------------------------------------------------------------------------

    def _counts(self) -> list[int]:
        """How many visual tokens each sample of the prompt has; `modality` is said on the way."""
        running = self.running
        if len(running.anywhere) == 1 and len(self.encoded) == 1:  # the model has seen to it that these are as many
            (running.modality, encoded), *_ = self.encoded.items()
            return [sum(encoded.lengths)]
        counts = torch.stack([visual.sum(1) for visual in running.visual.values()]).tolist()
        shown = [modality for modality, found in zip(running.visual, counts, strict=True) if any(found)]
        running.modality = shown[0] if len(shown) == 1 else None
        return [sum(found) for found in zip(*counts, strict=True)]

    def _prefill(self, application: Application, sites: Sequence[Site], given: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments after everything that happens before its first layer."""
        x, mask, positions = given["inputs_embeds"], given.get("attention_mask"), given.get("position_ids")
        running = self.running
        visual = running.anywhere
        counts = self._counts()
        if not any(counts):
            raise disagreement(0, 0)
        valid = None if mask is None or x.device.type == "meta" or bool(mask.all()) else mask.bool()
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

    def _held(self, layer: int) -> Held:
        """What the layers from this one on hold of the tokens at hand."""
        running = self.running
        tokens = running.tokens
        return Held(layer, running.source, tokens.valid, running.shift, tokens.bias)

    def _cut(self, application: Application, site: Site, x: Tensor) -> Tensor:
        """Carry out the method's plan on the sequence x [B, N, D]; everything that goes along with it follows."""
        plan, signals = self.decide(application, site, x)
        plan = padding_in_front(plan) if self.running.left else padding_behind(plan)
        self.running.changed |= plan.reduce.outputs != x.shape[1]
        if plan.rest == "bypass":
            self.set_aside(application, site, plan, x, "prunable", "source", "positions")
        else:
            self.follow(application, site, plan, x)
        y = application.method.refine(site, plan.reduce.apply(x), signals, plan)
        running, source, units = self.running, heaviest(plan.reduce, x.shape[1]), x.shape[1]
        valid = running.tokens.valid
        running.prunable, running.source = running.prunable.gather(1, source), running.source.gather(1, source)
        kept = running.positions.gather(-1, source.expand(*running.positions.shape[:-1], -1))
        if valid is not None:
            running.prunable = running.prunable & valid
        back = functools.partial(spread, plan.reduce, units=units)
        running.attribution.steps.append((site, running.prunable, back))
        if plan.positions == "renumber":
            kept = closed(kept, valid)
            running.shift = running.shift + following(running.positions, signals.valid) - following(kept, valid)
        running.positions = kept
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
                running.cached.held.append(self._held(layer))
                if running.changed and running.aside is None:
                    self._refuse_labels()
            if layer == 0 and -1 in self.read_layers:
                running.seen[-1] = Seen(running.tokens, {"hidden": x})
            if layer in self.read_layers:
                running.seen[layer] = Seen(running.tokens, {"visual": running.prunable})
            self._count_tokens(application, layer, x)
            if len(running.cached.held) > 1 or running.tokens.bias is not None:
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

    def _mask(self, valid: Tensor | None, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Causal mask [B, 1, N, K] in the form that the decoder's attention takes, for queries x [B, N, D], keys valid
        [B, K], and their bias."""
        eager = self.decoder.config._attn_implementation == "eager"
        rows = x.shape[1]
        if valid is None:
            if not eager and bias is None:
                return None
            valid = torch.ones(x.shape[:2] if bias is None else bias.shape, dtype=torch.bool, device=x.device)
        keys = valid.shape[1]
        causal = torch.ones(rows, keys, dtype=torch.bool, device=x.device).tril(keys - rows)
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

    # -- decoding ------------------------------------------------------------------------------------------------

    def _resume(self, cache: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments for tokens behind a pruned prompt: the model masks and numbers them by the prompt as
        it was, the first layer needs them by what it holds of it."""
        running = self.running
        if cache not in self.prompts:
            raise PrunelabError("this cache was filled without the method; run the prompt inside the `with` block")
        running.cached = self.prompts[cache]
        first, x = running.cached.at(0), given["inputs_embeds"]
        mask, positions = given.get("attention_mask"), given.get("position_ids")
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

    # -- observation ---------------------------------------------------------------------------------------------

    def _observe(self, application: Application) -> Callable[..., None]:
        """Behind a step of decoding: what the method is shown of it."""

        def hook(module: Any, args: Any, output: Any) -> None:
            if self.running.decoding:
                self.show(application, self.running.cached.visual, self._newest_row)

        return hook

    def _newest_row(self, layer: int) -> Tensor:
        """[B, H, N] the attention of the newest token to the tokens of the prompt; the layer lost those at zero."""
        cached = self.running.cached
        source = cached.at(layer).source
        seen = newest_row(self.recorders[layer])[..., : source.shape[1]]
        out = seen.new_zeros(*seen.shape[:2], cached.visual.shape[1])
        return out.scatter_add(2, source.unsqueeze(1).expand_as(seen), seen)

    # -- signals -------------------------------------------------------------------------------------------------

    def view(self, site: Site, x: Tensor) -> View:
        running = self.running
        return replace(
            super().view(site, x),
            prunable=running.prunable,
            units=x.shape[1] - running.text if running.tokens.valid is None else int(running.prunable.sum(1).max()),
            modality=running.modality,
        )

    def grids(self) -> tuple[tuple[int, int], ...]:
        return ()  # the sequence has text between its visual tokens, and newlines among them

    def sources(self, site: Site, x: Tensor) -> Mapping[str, Callable[[], Tensor]]:
        ahead: dict[str, Callable[[], Tensor]] = {}
        if site.where == "input":
            ahead = {
                "coming_row": functools.partial(self._coming_row, site.layer, x),
                "normed": lambda: self.decoder.norm(x),
            }
        if site.where == "packed" or site.layer == 0:
            tower = {name: functools.partial(self._from_tower, Reading(name, -1, "tower"), x) for name in FEATURES}
            return {**tower, **ahead}
        recorder = self.recorders.get(site.layer - 1)
        if recorder is None:
            return ahead
        seen, valid = recorder, self.running.tokens.valid

        return {
            **ahead,
            "queries": seen.shown,
            "keys": lambda: seen.keys,
            "attention_logits": seen.logits,
            "attention": seen.weights,
            "last_row": lambda: row(seen, last_index(x, valid)),
            "received": lambda: received(seen, valid),
        }

    def _coming_row(self, layer: int, x: Tensor) -> Tensor:
        """[B, H, N] the attention that a layer will pay for the last of the tokens x [B, N, D] which are about to enter
        it."""
        block, recorder, tokens = self.blocks[layer], self.recorders[layer], self.running.tokens
        with recorder.asking():
            block.self_attn(
                block.input_layernorm(x),
                position_embeddings=self.decoder.rotary_emb(x, self.axes(self.running.positions)),
                attention_mask=self._mask(tokens.valid, x, tokens.bias),
            )
        return row(recorder, last_index(x, tokens.valid))
