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

import torch
from torch import Tensor

from prunelab.common.core.attention_interface import Recorder, record, spared
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, before, replaced, run_all
from prunelab.common.core.plan import ModelInfo, Plan, Site
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.passes import SUBLAYERS, Application, Trace
from prunelab.common.tokens.adapters.recorded import (
    ALONE,
    behind,
    behind_a_bypass,
    last_index,
    received,
    row,
    sources,
    text_rows,
    windowed,
)
from prunelab.common.tokens.adapters.vlm_decoder import DecoderSide
from prunelab.common.tokens.adapters.vlm_effort import eased
from prunelab.common.tokens.adapters.vlm_inside import INSIDE
from prunelab.common.tokens.adapters.vlm_prompt import Prompt
from prunelab.common.tokens.adapters.vlm_tower import FEATURES
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import View

_ALWAYS = frozenset({"hidden", "sizes"})
_DECODER = frozenset({"queries", "keys", "attention_logits", "attention", "last_row", "received"})
_AHEAD = frozenset({"coming_row", "coming_text"})
_ANYWHERE = _AHEAD | {"normed"}  # in the decoder, before its first layer, too
_EARLIER = (ALONE - {"cls_row"}) | {"attention"} | SUBLAYERS


class VisionLanguage(DecoderSide):
    """A model of transformers whose `model` has a decoder that reads visual tokens among its text."""

    positions = frozenset({"original", "renumber"})
    rest = frozenset({"drop", "bypass"})
    gates = True
    decodes = True
    eases = True
    embeddings = True
    signals = {
        "tower": _ALWAYS | INSIDE,
        "encoded": _ALWAYS | FEATURES,
        "projected": _ALWAYS | FEATURES | {"text"},
        "packed": _ALWAYS | FEATURES,
        "input": _ALWAYS | _DECODER | _ANYWHERE,
    }

    @staticmethod
    def without(*places: str) -> dict[str, frozenset[str]]:
        """The signals of a class in which no token leaves at these places."""
        return {where: known for where, known in VisionLanguage.signals.items() if where not in places}

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
        counts = self.counts(prompt.modality, prompt.pixels)
        grids = self.crop_grids(prompt.modality, prompt.pixels, len(counts))
        sizes, more = zip(counts, grids, strict=True), int(prompt.modality in self.class_features)
        patches = [torch.empty(crops, height * width + more, 1, device="meta") for crops, (height, width) in sizes]
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

    def seen(self, trace: Trace) -> list[tuple[Any, float]]:
        total = sum(trace.sizes.values())
        return [(replace(trace.inputs[size], text=trace.text), n / total) for size, n in trace.sizes.items()]

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
            known = known - INSIDE
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
        self.recorders, self.all_recorders, self.encoded = {}, {}, {}
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
            for site in application.sites:
                if application.method.requires(site) & _AHEAD:
                    removers += spared(self.blocks[site.layer].self_attn, self.recorders[site.layer])
            for stop in eased(self, application):
                removers.append(stop)
            projector: Any = None
            if "projected" in self.signals and hasattr(self.body, self.projector.partition(".")[0]):
                projector = self.body.get_submodule(self.projector)
                removers.append(after(projector, self._keep_features))
            for site in application.sites:
                if site.where == "encoded":
                    removers.append(before(projector, self._decide_encoded(application, site)))
            for modality in self.tokens:
                removers.append(self._watch_encoder(modality))
            removers.append(self._watch_placeholders())
            removers.append(replaced(self.model, "forward", self._noting_labels(self.model.forward)))
            removers.append(before(self.body, self._begin, kwargs=True))
            # before what prunes the cache of the tokens that are left
            removers.append(before(self.decoder, self._enter(application), kwargs=True, first=True))
            removers.append(after(self.decoder, self._observe(application)))
            removers.append(after(self.decoder, self._trim(application)))
            removers.append(after(self.decoder, self.end))
            for layer, block in enumerate(self.blocks):
                removers.append(before(block, self._layer(application, layer), kwargs=True))
                if application.method.rest == "bypass" and any(site.layer == layer for site in application.sites):
                    removers.append(after(block, self._come_back(layer)))
            for layer in range(self.carries):
                removers.append(after(self.blocks[layer], self._give(layer)))
        except BaseException:
            run_all(removers)
            raise
        return lambda: run_all(removers)

    def _record(self, layer: int, names: set[str], removers: list[Callable[[], Any]]) -> None:
        if layer < 0:  # what enters the first, which its hook keeps
            return
        block = self.blocks[layer]
        self.recorders[layer], stop = record(block.self_attn)
        removers.append(stop)
        modules = {
            "hidden": block,
            "values": block.self_attn.v_proj,
            "attention_input": block.input_layernorm,
            "attention_output": block.self_attn,
            "mlp_input": block.post_attention_layernorm,
            "mlp_output": block.mlp,
        }
        for name in names & modules.keys():
            removers.append(after(modules[name], self._keep(layer, name)))

    def _keep(self, layer: int, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if not self.running.decoding and not self.recorders[layer].ahead:
                self.running.seen[layer].kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    # -- signals -------------------------------------------------------------------------------------------------

    def view(self, site: Site, x: Tensor) -> View:
        running = self.running
        return replace(
            super().view(site, x),
            prunable=running.prunable,
            units=x.shape[1] - running.text if running.tokens.valid is None else int(running.prunable.sum(1).max()),
            modality=running.modality,
            groups=running.groups,
        )

    def grids(self) -> tuple[tuple[int, int], ...]:
        return ()  # the sequence has text between its visual tokens, and newlines among them

    def sources(self, site: Site, x: Tensor) -> Mapping[str, Callable[[], Tensor]]:
        ahead: dict[str, Callable[[], Tensor]] = {}
        if site.where == "input":
            ahead = {
                "coming_row": functools.partial(self._coming_row, site.layer, x),
                "coming_text": functools.partial(self._coming_text, site.layer, x),
                "normed": lambda: self.decoder.norm(x),
            }
        if site.where == "packed" or site.layer == 0:
            tower = {name: functools.partial(self._from_tower, Reading(name, -1, "tower"), x) for name in FEATURES}
            return {**tower, **ahead}
        recorder = self.recorders.get(site.layer - 1)
        if recorder is None:
            return ahead
        seen, went = recorder, self.running.passed.get(site.layer - 1)
        valid = self.running.tokens.valid if went is None else went.valid
        known: dict[str, Callable[[], Tensor]] = {
            "queries": seen.shown,
            "keys": lambda: seen.keys,
            "attention_logits": seen.logits,
            "attention": seen.weights,
            "last_row": lambda: row(seen, last_index(x, valid)),
            "received": lambda: received(seen, valid),
        }
        return ahead | (known if went is None else behind_a_bypass(known, seen, went, x.shape[1]))

    def _coming(self, layer: int, x: Tensor, only: Tensor | None = None) -> Recorder:
        """What a layer's attention will work on, of the tokens x [B, N, D] which are about to enter it; of queries that
        of one token [B, 1], if it is given."""
        block, recorder, tokens = self.blocks[layer], self.recorders[layer], self.running.tokens
        with recorder.asking(only):
            block.self_attn(
                block.input_layernorm(x),
                position_embeddings=self.decoder.rotary_emb(x, self.axes(self.running.positions)),
                attention_mask=self._mask(tokens.valid, x, tokens.bias),
            )
        return recorder

    def _coming_row(self, layer: int, x: Tensor) -> Tensor:
        """[B, H, N] the attention that the last token will pay there."""
        last = last_index(x, self.running.tokens.valid)
        return row(self._coming(layer, x, last), last)

    def _coming_text(self, layer: int, x: Tensor) -> Tensor:
        """[B, H, R, N] the attention that the text behind the picture will pay there."""
        running = self.running
        recorder, count = self._coming(layer, x), behind(running.anywhere)
        return text_rows(recorder, running.prunable, running.tokens.valid, count)
