"""The side of an image or video language model before its decoder: what its encoder gave, and plans carried out on
features before they are packed (site `projected`)."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prunelab.common.core.attention_interface import Recorder, record
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import after, arguments, before, replaced
from prunelab.common.core.plan import Gather, ModelInfo, Plan, Positions, Site, take
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.base import Application, Pass, Seen, SequenceAdapter, Tokens
from prunelab.common.tokens.adapters.recorded import first_row, keeper, received
from prunelab.common.tokens.adapters.vlm_attribution import Attribution, Masses, handed_back
from prunelab.common.tokens.adapters.vlm_prompt import (
    CachedPrompt,
    Encoded,
    Fresh,
    Span,
    closed,
    disagreement,
    following,
    grid_places,
    in_packed_order,
    newline_order,
    spliced,
)
from prunelab.common.tokens.adapters.vlm_tower import (
    FEATURES,
    OWN,
    READ,
    Decision,
    Part,
    TowerPass,
    shaped,
    spread_out,
)
from prunelab.common.tokens.role import TokenPruner
from prunelab.common.tokens.signals import View

_INSIDE = frozenset({"queries", "keys", "attention_logits", "attention", "cls_row", "received"})


@dataclass
class Prefill(Pass):
    """One prompt on its way to and through the decoder; for tokens behind a cached prompt, what that left.

    encoded, visual: what the encoder gave, and where it stands in the prompt, [B, N] bool, by modality. text: tokens of
    the prompt that are not visual. Of the tokens at hand: prunable [B, N] bool, source [B, N] the index in the prompt,
    positions [..., B, N] the position ids; shift [..., B] by how much later tokens are numbered lower than the model
    would number them. cached: what the layers hold. left: whether padding stands in front. changed: whether
    tokens left for good. modality: of the visual tokens, None where they are of several. whole:
    while decoding, whether no token behind the prompt is padding. indexed: whether `source` is
    where each token was packed. later, now: while decoding, [B, M] which tokens behind the prompt
    count, and the position ids of the newest.
    """

    encoded: dict[str, Encoded] = field(default_factory=dict)
    visual: dict[str, Tensor] = field(default_factory=dict)
    text: int = 0
    prunable: Tensor = field(init=False)
    source: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    shift: Tensor = field(init=False)
    cached: CachedPrompt = field(init=False)
    attribution: Attribution = field(init=False)
    indexed: bool = True
    left: bool = True
    changed: bool = False
    modality: str | None = None
    whole: bool = True
    later: Tensor = field(init=False)
    now: Tensor = field(init=False)

    @property
    def anywhere(self) -> Tensor:
        """[B, N] bool: the visual tokens of any modality."""
        return functools.reduce(torch.logical_or, self.visual.values())


class VisionSide(SequenceAdapter[Prefill]):
    """A model of transformers whose `model.get_image_features` (and `get_video_features`) feed a decoder."""

    tower_reads: ClassVar[frozenset[str]] = READ  # what methods may read of the tower's layers
    tokens: ClassVar[Mapping[str, str]] = {"image": "image_token_id"}  # placeholder of each modality, in the config

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        owner: Any = model
        self.config: Any = owner.config
        self.body: Any = owner.model
        self.recorders: dict[int, Recorder] = {}  # by decoder layer
        self.tower_recorders: dict[int, Recorder] = {}  # by layer of the tower

    def started(self) -> Prefill:
        return Prefill()

    @property
    def encoded(self) -> dict[str, Encoded]:
        """What the encoder gave last, by modality: `generate` runs it before the forward pass."""
        found: dict[str, Encoded] = getattr(self._own, "encoded", {})
        return found

    @encoded.setter
    def encoded(self, new: dict[str, Encoded]) -> None:
        self._own.encoded = new

    @property
    def features(self) -> Tensor | None:
        """[crops, patches, D] as they left the projector last."""
        return getattr(self._own, "features", None)

    # -- what a class of models fills in -------------------------------------------------------------------------

    @abstractmethod
    def pixels(self) -> dict[str, Any]:
        """Meta-device arguments of the image encoder, for one standard image."""

    def video(self, frames: int) -> dict[str, Any]:
        """The same of the video encoder, for one video, where the class has such a one."""
        raise NotImplementedError

    @abstractmethod
    def packing(self, modality: str, given: Mapping[str, Any]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """How anything known of each image's patches, [crops, patches, C], takes the way that features take to the
        decoder's sequence; `given` are the encoder's arguments."""

    @abstractmethod
    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        """Crops of each image, or frames of each video."""

    def crops(self, modality: str, given: Mapping[str, Any], output: Any) -> list[Tensor]:
        """Features [crops, patches, D] of each image or video behind the projector and before packing."""
        return [] if self.features is None else list(self.features.split(self.counts(modality, given)))

    def newline(self, modality: str) -> tuple[Tensor, str] | None:
        """The vector that separates rows of a plan's layout, and whether it comes behind each `row` or at the `end`."""
        return None

    def grid(self) -> tuple[int, int]:
        """Patches of one crop or frame, by height and width."""
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def crop_grids(self, modality: str, given: Mapping[str, Any], features: list[Tensor]) -> list[tuple[int, int]]:
        """Height and width of each image's crops, in patches."""
        return [self.grid()] * len(features)

    def encoder(self) -> Sequence[Any]:
        """All layers of the tower; none where they cannot be read."""
        return [m for m in self.body.vision_tower.modules() if hasattr(getattr(m, "self_attn", None), "q_proj")]

    def tower(self) -> Sequence[Any]:
        """The tower's layers up to the one whose output becomes features; none where they cannot be read."""
        last = self.config.vision_feature_layer
        if not isinstance(last, int):
            return []
        layers = self.encoder()
        return layers[: last if last >= 0 else len(layers) + 1 + last]

    def tower_layer(self, reading: Reading) -> int:
        """The number of the tower's layer that is read, counted from 0."""
        return reading.layer % len(self.encoder() if reading.where == "encoder" else self.tower())

    @cached_property
    def tower_info(self) -> ModelInfo | None:
        """Sizes of the tower, for one crop."""
        layers, (height, width) = self.tower(), self.grid()
        if not layers:
            return None
        attention, special = layers[0].self_attn, int(self.class_token)
        return ModelInfo(
            family=f"{self.family}_tower",
            depth=len(layers),
            heads=attention.num_heads,
            width=attention.embed_dim,
            tokens=height * width + special,
            special=special,
            class_token=self.class_token,
            grid=(height, width),
        )

    @property
    def class_token(self) -> bool:
        """Whether the tower puts a class token before its patches."""
        return self.config.vision_feature_select_strategy == "default"

    # -- the encoder ---------------------------------------------------------------------------------------------

    def _watch_encoder(self, modality: str) -> Callable[[], Any]:
        """Notes how each batch of images or videos was packed. The encoder is a method of the model that `generate`
        calls by itself, so it is wrapped on the instance, where hooks do not reach."""
        name = f"get_{modality}_features"
        original = getattr(self.body, name)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            given = arguments(self.body, name, args, kwargs)
            counts = self.counts(modality, given)
            if not counts or min(counts) < 1:
                part = "video without a frame" if modality == "video" else "prompt's images without pixels"
                raise PrunelabError(f"the model was given a {part}; give at least one")
            self._own.features = None
            self._own.encoding = TowerPass(modality=modality, given=given, recorders=self.tower_recorders)
            output = original(*args, **kwargs)
            pack, seen = self.packing(modality, given), self.encoding
            self._take_recorders()
            features = self.crops(modality, given, output)
            lengths = [len(tokens) for tokens in output.pooler_output]
            grids, first = self.crop_grids(modality, given, features), output.pooler_output[0]
            made = Encoded(lengths, features, pack, grids, seen, first)
            self.encoded = self.encoded | {modality: made}
            return output

        return replaced(self.body, name, encode)

    def _watch_placeholders(self) -> Callable[[], Any]:
        """Says in one line how many placeholders a prompt lacks, where the model would raise an error of its own."""
        name = "get_placeholder_mask"
        original = getattr(self.body, name)

        @functools.wraps(original)
        def match(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except (ValueError, RuntimeError):  # the model counts them itself; so as to look once, we ask only now
                given = arguments(self.body, name, args, kwargs)
                ids = given.get("input_ids")
                for modality, token in self.tokens.items():
                    features = given.get(f"{modality}_features")
                    placeholders = None if ids is None else int((ids == getattr(self.config, token)).sum())
                    if features is not None and placeholders is not None and placeholders != len(features):
                        raise disagreement(placeholders, len(features)) from None
                raise

        return replaced(self.body, name, match)

    def _keep_features(self, module: Any, args: Any, output: Tensor) -> Tensor:
        """Features of patches that left the tower are zero, so that the others are packed as ever."""
        special, encoding = int(self.class_token), self.encoding
        if encoding.decisions:
            output = encoding.projected(output)
        else:
            output = spread_out(output, encoding.patches(special), encoding.total - special)
        self._own.features = output
        return output

    def _take_recorders(self) -> None:
        """What the tower's layers worked on is kept, whatever they work on next."""
        self.encoding.recorders = {layer: recorder.taken() for layer, recorder in self.tower_recorders.items()}

    @property
    def encoding(self) -> TowerPass:
        """The run of the encoder that is at work in this thread, or was last."""
        found: TowerPass = self._own.encoding
        return found

    def check_encoder(self, method: TokenPruner, sites: Sequence[Site]) -> None:
        """Refuse sites that this model's encoder does not have."""
        places, depth = {site.where for site in sites}, len(self.tower())
        if any(site.where == "tower" and not 0 <= site.layer < depth for site in sites):
            raise PrunelabError(f"{method.name}: this model's encoder has {depth} layers before its features")
        if len(places & {"tower", "encoded", "projected"}) > 1:
            raise PrunelabError(f"{method.name} prunes inside the encoder and right behind it; do one of them")
        if any(site.class_token for site in sites) and not (depth and self.class_token):
            raise PrunelabError(f"{method.name} keeps the encoder's class token, and this model's has none")

    def readable_of_tower(self, site: Site, reading: Reading) -> str | None:
        """Why a reading of the encoder's layers cannot be had; None where it can."""
        depth = len(self.tower())
        if not depth:
            return "this model's encoder gives no signals"
        if reading.name not in self.tower_reads:
            return f"methods read {', '.join(sorted(self.tower_reads))} of the encoder's layers"
        if (reading.name == "cls_row" or reading.rows == "class") and not self.class_token:
            return "its encoder has no class token"
        if reading.rows == "class" and (reading.name not in OWN or site.where not in ("encoded", "projected")):
            return f"of class tokens, {', '.join(sorted(OWN))} are read, where one image is by itself"
        last = len(self.encoder()) if reading.where == "encoder" else depth
        if not -last <= reading.layer < last:
            if reading.where == "encoder":
                return f"it has layers 0 to {last - 1}"
            return f"its features come from layer {depth - 1}, the last that can be read"
        if site.where == "tower" and self.tower_layer(reading) >= site.layer:
            return f"layers 0 to {site.layer - 1} have run there" if site.layer else "no layer has run there"
        return None

    # -- inside the encoder --------------------------------------------------------------------------------------

    def _watch_tower(self, application: Application) -> Iterator[Callable[[], Any]]:
        """Hooks on the layers of the tower that are read, and that tokens leave before."""
        layers = self.encoder() if self.tower() else []
        features, wanted = len(self.tower()) - 1, self._read_of_tower(application)
        sites = [site for site in application.sites if site.where == "tower"]
        if sites:
            yield before(layers[0], self._begin_tower, first=True)
        for site in sites:  # before what reads the layer
            yield before(layers[site.layer], self._cut_tower(application, site))
        for site in application.sites:
            required = application.method.requires(site)
            if site.class_token:
                wanted.setdefault(features, set()).add("hidden")
            if site.where == "tower":
                if required & _INSIDE:
                    wanted.setdefault(site.layer - 1, set())
            elif required & FEATURES and (site.where != "input" or not site.layer):
                wanted.setdefault(features, set())
        for layer, names in wanted.items():
            yield from self._watch_tower_layer(layer, names)

    def _read_of_tower(self, application: Application) -> dict[int, set[str]]:
        """What is read of the tower's layers: names by layer."""
        found: dict[int, set[str]] = {}
        for site in application.sites:
            for reading in application.method.requires(site):
                if isinstance(reading, Reading) and reading.where != "layer":
                    found.setdefault(self.tower_layer(reading), set()).add(reading.name)
        return found

    def _watch_tower_layer(self, layer: int, names: set[str]) -> Iterator[Callable[[], Any]]:
        """Hooks that keep what these signals of a layer are made from."""
        block = self.encoder()[layer]
        self.tower_recorders[layer], stop = record(block.self_attn)
        yield stop
        yield before(block, self._see_tower(layer))
        if "hidden" in names:
            yield after(block, keeper(functools.partial(self._seen, layer), "hidden"))
        if "values" in names:
            yield after(block.self_attn.v_proj, keeper(functools.partial(self._seen, layer), "values"))

    def _seen(self, layer: int) -> Seen:
        return self.encoding.seen[layer]

    def _see_tower(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self.encoding.seen[layer] = Seen(Tokens())
            self.encoding.total = self.encoding.total or args[0].shape[1]

        return hook

    def _begin_tower(self, module: Any, args: Any) -> None:
        self.encoding.total = args[0].shape[1]

    def _cut_tower(self, application: Application, site: Site) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            x, encoding = args[0], self.encoding
            if site.index == 0:
                encoding.kept = []
            plan, signals = self.decide(application, site, x, self._inside(site, x), encoding)
            if not isinstance(plan.reduce, Gather) or plan.reduce.valid is not None:
                raise PrunelabError(
                    f"{application.method.name}: inside an image encoder as many tokens of every crop go on, unmerged"
                )
            encoding.reduce(plan.reduce)
            special = int(self.class_token)
            if encoding.left is not None:
                encoding.kept.append((site, encoding.left[:, special:] - special))
            return application.method.refine(site, plan.reduce.apply(x), signals, plan), *args[1:]

        return hook

    def _inside(self, site: Site, x: Tensor) -> View:
        """The tokens x [C, N, D] of crops that enter a layer of the tower."""
        encoding, special = self.encoding, int(self.class_token)
        prunable = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        prunable[:, :special] = False
        found: dict[str, Callable[[], Tensor]] = {}
        recorder = self.tower_recorders.get(site.layer - 1)
        if recorder is not None:
            found = {
                "queries": recorder.shown,
                "keys": lambda: recorder.keys,
                "attention_logits": recorder.logits,
                "attention": recorder.weights,
                "cls_row": lambda: first_row(recorder),
                "received": lambda: received(recorder),
            }
        indices = encoding.left
        if indices is None:
            indices = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return View(
            {"hidden": lambda: x, "sizes": lambda: torch.ones_like(prunable, dtype=torch.float32), **found},
            prunable,
            other=lambda reading: encoding.own(reading.name, self.tower_layer(reading), self.tower_head),
            units=x.shape[1] - special,
            indices=indices,
            grids=(self.grid(),),
            modality=encoding.modality,
            info=self.tower_info,
        )

    # -- what the encoder says, at later sites -------------------------------------------------------------------

    def _of_patches(self, reading: Reading, encoded: Encoded, part: Part = "patches") -> list[Tensor]:
        """A signal of a layer of the tower, [crops, N, channels] of each image."""
        layer, special = self.tower_layer(reading), int(self.class_token)
        whole = encoded.seen.signal(reading.name, layer, self.tower_head, special, part)
        return list(whole.split([len(features) for features in encoded.features]))

    @property
    def tower_head(self) -> int:
        """Channels of a head of the tower."""
        size: int = self.tower()[0].self_attn.head_dim
        return size

    def _from_tower(self, reading: Reading, x: Tensor) -> Tensor:
        """The same for what became each token of the sequence, in the shape of a site's signal: it is packed as
        features are. Text and newlines get zeros."""
        running = self.running
        if not running.encoded:
            raise PrunelabError(f"'{reading}' is read off the image encoder; give the model pixels, not features")
        if not running.indexed:
            raise PrunelabError(f"'{reading}' is of patches, which tokens that are packed no more by rule cannot tell")
        out: Tensor | None = None
        for modality, encoded in running.encoded.items():
            visual = running.visual[modality]
            images = encoded.pack(self._of_patches(reading, encoded))
            owners = encoded.owners(visual.sum(1).tolist())
            if out is None:
                out = x.new_zeros(*visual.shape, images[0].shape[-1])
            for row, (places, own) in enumerate(zip(visual, owners, strict=True)):
                if own:
                    spots = places.nonzero().squeeze(1).to(out.device)
                    out[row] = out[row].index_copy(0, spots, torch.cat([images[i] for i in own]).to(out))
        assert out is not None
        return shaped(take(out, running.source), reading.name, self.tower_head)

    # -- plans before packing ------------------------------------------------------------------------------------

    def _decide_encoded(self, application: Application, site: Site) -> Callable[..., Any]:
        """Hook before the projector: only what the method makes of each image's features goes through it. Images of
        one size are decided on together."""

        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            encoding, special = self.encoding, int(site.class_token)
            modality, given, found = encoding.modality, encoding.given, args[0]
            self._take_recorders()
            features = list(found.split(self.counts(modality, given)))
            grids = self.crop_grids(modality, given, features)
            pack = self.packing(modality, given)
            lengths = [len(tokens) for tokens in pack([torch.ones(*f.shape[:2], 1) for f in features])]
            encoded = Encoded(lengths, features, pack, grids, encoding, found)
            if special:
                first = (
                    encoding.seen[len(self.tower()) - 1].kept["hidden"][:, :special].split([len(f) for f in features])
                )
                features = [torch.cat(parts, 1) for parts in zip(first, features, strict=True)]
            read = encoded.read()
            groups: dict[Any, list[int]] = {}
            for i, key in enumerate(zip((f.shape for f in features), grids, read, strict=True)):
                groups.setdefault(key, []).append(i)
            for (shape, _, _), images in groups.items():
                x, view = self._units(encoded, images, [features[i] for i in images], special)
                view = replace(view, packed=read[images[0]])
                plan, signals = self.decide(application, site, x, view, encoding)
                if plan.key_bias is not None:
                    raise PrunelabError(
                        f"{application.method.name}: no attention is biased before the decoder; leave key_bias out"
                    )
                tokens = application.method.refine(site, plan.reduce.apply(x), signals, plan)
                encoding.decisions.append(Decision(images, tokens, plan, (shape[0], shape[1]), special))
            for decision in encoding.decisions:
                if (kept := decision.kept()) is not None:
                    encoding.kept.append((site, kept))
            flat = torch.cat([decision.tokens.flatten(0, 1) for decision in encoding.decisions])
            return flat.unsqueeze(0), *args[1:]

        return hook

    def _units(
        self, encoded: Encoded, images: Sequence[int], features: Sequence[Tensor], special: int = 0
    ) -> tuple[Tensor, View]:
        """Features [crops, units, D] of images of one shape as the units [G, crops * units, D] of a site, `special`
        ones in front of the patches of each crop."""
        count, units = features[0].shape[:2]
        x = torch.stack([f.flatten(0, 1) for f in features])
        prunable = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if special:
            prunable.unflatten(1, (count, units))[:, :, :special] = False

        def tower(reading: Reading) -> Tensor:
            part: Part = "class" if reading.rows == "class" else "all" if special else "patches"
            crops = self._of_patches(reading, encoded, part)
            return shaped(torch.stack([crops[i].flatten(0, 1) for i in images]), reading.name, self.tower_head)

        view = View(
            {
                "hidden": lambda: x,
                "sizes": lambda: x.new_ones(x.shape[:2], dtype=torch.float32),
                **{name: functools.partial(tower, Reading(name, -1, "tower")) for name in FEATURES},
            },
            prunable=prunable,
            units=count * (units - special),
            other=tower,
            indices=torch.arange(x.shape[1], device=x.device).expand(len(x), -1),
            grids=(encoded.grids[images[0]],) * count,
            modality=encoded.seen.modality,
        )
        return x, view

    def projected(self, modality: str, images: Sequence[int], sequence: Tensor | None = None) -> tuple[Tensor, View]:
        """Features [G, crops * patches, D] of images of one shape, as a `projected` site sees them; with the sequence
        [B, N, D] that they stand in the words around them, too."""
        encoded = self.running.encoded[modality]
        x, view = self._units(encoded, images, [encoded.features[i] for i in images])
        text = {} if sequence is None else {"text": functools.partial(self._text, modality, images, sequence)}
        return x, replace(view, sources={**view.sources, **text}, packed=encoded.read()[images[0]])

    def _decided(self, application: Application, site: Site, modality: str, sequence: Tensor) -> Iterator[Decision]:
        """What the method makes of each group of images, at `tower` and `encoded` already while they were encoded."""
        encoded = self.running.encoded[modality]
        if site.where == "encoded":
            yield from encoded.seen.decisions
            return
        shapes = [features.shape for features in encoded.features]
        keys = list(zip(shapes, encoded.grids, encoded.read(), strict=True))
        for group in dict.fromkeys(keys):
            images = [i for i, key in enumerate(keys) if key == group]
            if site.where == "tower":
                tokens, plan = self._left(application, encoded, images)
            else:
                x, view = self.projected(modality, images, sequence)
                plan, signals = self.decide(application, site, x, view)
                tokens = application.method.refine(site, plan.reduce.apply(x), signals, plan)
            decision = Decision(images, tokens, plan, (group[0][0], group[0][1]))
            if site.where == "projected" and (kept := decision.kept()) is not None:
                self.running.kept.append((site, kept))
            yield decision

    def _left(self, application: Application, encoded: Encoded, images: Sequence[int]) -> tuple[Tensor, Plan]:
        """Tokens [G, crops * patches, D] of images of one shape, and what is left of them behind the tower."""
        patches, bounds = encoded.seen.patches(int(self.class_token)), encoded.bounds()
        assert patches is not None
        crops, size = encoded.features[images[0]].shape[:2]
        first = size * torch.arange(crops, device=patches.device).unsqueeze(1)
        index = torch.stack([(patches[bounds[i] : bounds[i] + crops] + first).flatten() for i in images])
        plan = Plan(Gather(index), positions=application.method.positions)
        return plan.reduce.apply(torch.stack([encoded.features[i].flatten(0, 1) for i in images])), plan

    def _project(self, application: Application, site: Site, x: Tensor) -> Tensor:
        """Carry out the method's plans on the features of every image or video, in place of its packed tokens in the
        sequence x [B, N, D]. Images of one size are decided on together, copies of a sample only once."""
        running = self.running
        if site.where == "projected":
            self.note(application, site, None)
        batch, total = x.shape[:2]
        pool, size = [x.flatten(0, 1)], batch * total  # what the new sequence is made of: the old one, then new tokens
        spans: list[list[Span]] = [[] for _ in range(batch)]
        backs: list[tuple[str, Callable[[Tensor], Tensor]]] = []
        for modality, visual in running.visual.items():
            counts = visual.sum(1).tolist()
            if not any(counts):
                continue
            encoded = running.encoded.get(modality)
            if encoded is None or not encoded.features:
                raise PrunelabError("the model was given packed features; give it pixels to prune what is projected")
            fresh = []
            images, numbering = self._packed(application, site, modality, x)
            for image in images:
                pool.append(image.tokens.to(x))
                fresh.append((torch.arange(size, size + len(image.tokens), device=x.device), image.source_index))
                size += len(image.tokens)
                backs.append((modality, image.back))
                running.indexed = running.indexed and image.source_index is not None
            for sample, own in enumerate(encoded.owners(counts)):
                places = visual[sample].nonzero().squeeze(1).split([encoded.lengths[i] for i in own])
                spans[sample] += [Span(place, *fresh[i]) for place, i in zip(places, own, strict=True)]
        valid, visible = running.tokens.valid, running.anywhere
        made = []
        for sample in range(batch):
            text = ~visible[sample] if valid is None else ~visible[sample] & valid[sample].to(visible.device)
            words = text.nonzero().squeeze(1)
            made.append(spliced(words, words.to(x.device) + sample * total, spans[sample], visible.device))
        longest = max(len(rows) for rows, _ in made)
        lengths = [len(part) for part, _ in made]
        pads = [(longest - length, 0) if running.left else (0, longest - length) for length in lengths]
        rows, running.source = (
            torch.stack([nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)])
            for parts in zip(*made, strict=True)
        )
        running.changed |= longest != total
        kept = None
        if len(set(lengths)) > 1:
            ones = [torch.ones(length, dtype=torch.bool, device=x.device) for length in lengths]
            kept = torch.stack([nn.functional.pad(one, pad) for one, pad in zip(ones, pads, strict=True)])
        running.prunable = rows >= batch * total
        sizes = [len(tokens) for tokens in pool]

        def root(mass: Tensor) -> Masses:
            parts = torch.zeros(size).scatter_add(0, rows.flatten().cpu(), mass.flatten()).split(sizes)[1:]
            found: Masses = {}
            for (modality, back), part in zip(backs, parts, strict=True):
                found.setdefault(modality, []).append(back(part))
            return found

        running.attribution.steps.append((site, running.prunable, lambda mass: mass))
        running.attribution.root = root
        positions = running.positions.gather(-1, running.source.expand(*running.positions.shape[:-1], -1))
        if numbering == "renumber":
            positions = closed(positions, kept)
            running.shift = running.shift + following(running.positions, valid) - following(positions, kept)
        running.positions = positions
        running.tokens = Tokens(valid=kept, origin=running.source)
        return torch.cat(pool).index_select(0, rows.flatten()).view(batch, longest, -1)

    def _packed(
        self, application: Application, site: Site, modality: str, sequence: Tensor
    ) -> tuple[list[Fresh], Positions]:
        """What the method's plans make of each image of the sequence [B, N, D], and how they number it."""
        encoded, numbering = self.running.encoded[modality], application.method.positions
        made: dict[int, Fresh] = {}
        orders, newlines, newline = encoded.order(), encoded.newlines(), self.newline(modality)
        for decision in self._decided(application, site, modality, sequence):
            plan, patches = decision.plan, decision.patches()
            numbering = plan.positions
            bare = plan.layout is not None and bool((plan.layout < 0).all())
            for g, image in enumerate(decision.images):
                real = slice(None) if plan.reduce.valid is None else plan.reduce.valid[g]
                own, order = decision.tokens[g][real], orders[image]
                turn, source_index = torch.arange(len(own), device=own.device), None
                if patches is not None and order is not None and (plan.layout is None or bare):
                    rows = newline is not None and not bare
                    turn, source_index = in_packed_order(
                        patches[g][real], order, decision.shape[0] * decision.shape[1], rows
                    )
                elif newline is not None and not bare and plan.layout is None and own.device.type == "meta":
                    most = newlines[image]  # which rows hold a token is in the values; as many as can are taken to
                    turn = turn.new_empty(len(own) + min(most, len(own)))
                elif newline is not None and not bare:
                    place = None if plan.layout is None else plan.layout[g][real]
                    if place is None and patches is not None and modality == "video":
                        place = grid_places(patches[g][real], encoded.grids[image])
                    turn = newline_order(len(own), place, newline[1], own.device)
                if plan.positions == "original" and source_index is None:
                    raise PrunelabError(
                        f"{application.method.name} makes tokens that have no place in the packed sequence; let it"
                        " number them anew (positions='renumber')"
                    )
                if newline is not None:
                    own = torch.cat([own, newline[0].to(own).unsqueeze(0)])  # where `turn` is -1
                back = functools.partial(
                    handed_back, turn=turn, reduce=plan.reduce, row=g, shape=decision.shape, special=decision.special
                )
                made[image] = Fresh(own[turn], source_index, back)
        return [made[image] for image in range(len(orders))], numbering

    def _text(self, modality: str, images: Sequence[int], sequence: Tensor) -> Tensor:
        """[G, D] the mean embedding of the words in the prompts [B, N, D] that the images belong to."""
        running = self.running
        words = ~running.anywhere.to(sequence.device)
        if running.tokens.valid is not None:
            words = words & running.tokens.valid
        mean = (sequence * words.unsqueeze(-1)).sum(1) / words.sum(1, keepdim=True).clamp_min(1)
        owners = running.encoded[modality].owners(running.visual[modality].sum(1).tolist())
        rows = {image: row for row, own in reversed(list(enumerate(owners))) for image in own}
        return mean[[rows[image] for image in images]]
