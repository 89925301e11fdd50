"""The side of an image or video language model before its decoder: what a class of models says of its encoder, and what
that gave."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab.common.core.attention_interface import Recorder, pixels_in, pixels_name
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.hooks import arguments, replaced
from prunelab.common.core.plan import ModelInfo
from prunelab.common.core.signals import Reading
from prunelab.common.tokens.adapters.passes import Pass
from prunelab.common.tokens.adapters.sequence import SequenceAdapter
from prunelab.common.tokens.adapters.vlm_attribution import Attribution
from prunelab.common.tokens.adapters.vlm_prompt import CachedPrompt, Encoded, Fresh, disagreement
from prunelab.common.tokens.adapters.vlm_tower import READ, TowerPass


@dataclass
class Prefill(Pass):
    """One prompt on its way to and through the decoder; for tokens behind a cached prompt, what that left.

    encoded, visual: what the encoder gave, and where it stands in the prompt, [B, N] bool, by modality. text: tokens of
    the prompt that are not visual. Of the tokens at hand: prunable [B, N] bool, source [B, N] the index in the prompt,
    positions [..., B, N] the position ids; shift [..., B] by how much later tokens are numbered lower than the model
    would number them. cached: what the layers hold. left: whether padding stands in front. changed: whether
    tokens left for good. windows: masks of attention within windows of the picture, by their side. modality: of the
    visual tokens, None where they are of several. whole:
    while decoding, whether no token behind the prompt is padding. made, behind, rows: where
    plans for single images acted, what they made of each, how many tokens stand before these, and
    the number [B, N] of each token at hand among all; groups [B, N] of these plans. later, now: while decoding, [B, M]
    which tokens behind the prompt count, and the position ids of the newest. carried: [B, N, L * D] what is added to
    the tokens at hand behind each of the first L layers, where a class of models does that.
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
    made: list[tuple[str, int, Fresh]] = field(default_factory=list)
    behind: int = 0
    rows: Tensor | None = None
    groups: Tensor | None = None
    taken: Tensor | None = None  # [B, K] the tokens that the last plan took, None where it mixed them
    left: bool = True
    changed: bool = False
    windows: dict[int, Tensor] = field(default_factory=dict)
    modality: str | None = None
    whole: bool = True
    carried: Tensor | None = None
    later: Tensor = field(init=False)
    now: Tensor = field(init=False)

    @property
    def anywhere(self) -> Tensor:
        """[B, N] bool: the visual tokens of any modality."""
        return functools.reduce(torch.logical_or, self.visual.values())


def squares(values: Tensor, side: int) -> Tensor:
    """Means [C, tokens, channels] of values [C, patches, channels] over squares of patches, those of a square image."""
    height = math.isqrt(values.shape[1])
    pooled = functional.avg_pool2d(values.transpose(1, 2).unflatten(2, (height, -1)), side)
    return pooled.flatten(2).transpose(1, 2)


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    """A size by height and width, as a config has it."""
    return (size, size) if isinstance(size, int) else size


class VisionSide(SequenceAdapter[Prefill]):
    """A model of transformers whose `model.get_image_features` (and `get_video_features`) feed a decoder."""

    tower_reads: ClassVar[frozenset[str]] = READ  # what methods may read of the tower's layers
    tower_attention: ClassVar[str] = "self_attn"  # what the tower's layers call it
    towers: ClassVar[Mapping[str, str]] = {"image": "vision_tower", "video": "vision_tower"}  # of each modality
    decoders: ClassVar[str] = "language_model"  # what the class calls its decoder
    prefixes: ClassVar[bool] = False  # whether a prompt, told by its `token_type_ids`, sees all of itself
    projector: ClassVar[str] = "multi_modal_projector"  # and what its features go through, if it is a module of its own
    class_features: ClassVar[frozenset[str]] = frozenset()  # modalities whose crops bring their class token along
    tokens: ClassVar[Mapping[str, str]] = {"image": "image_token_id"}  # placeholder of each modality, in the config

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        owner: Any = model
        self.config: Any = owner.config
        self.body: Any = owner.model
        self.all_recorders: dict[str, dict[int, Recorder]] = {}  # by tower and layer

    def started(self) -> Prefill:
        return Prefill()

    @property
    def encoded(self) -> dict[str, Encoded]:
        """What the encoder gave last, by modality: `generate` runs it before the forward pass."""
        results: dict[str, Encoded] = getattr(self._own, "encoded", {})
        return results

    @encoded.setter
    def encoded(self, new: dict[str, Encoded]) -> None:
        self._own.encoded = new

    @property
    def features(self) -> Tensor | None:
        """[crops, patches, D] as they left the projector last."""
        return getattr(self._own, "features", None)

    @property
    def encoding(self) -> TowerPass:
        """The run of the encoder that is at work in this thread, or was last."""
        result: TowerPass = self._own.encoding
        return result

    # -- what a class of models fills in -------------------------------------------------------------------------------

    def pixels(self) -> dict[str, Any]:
        """Meta-device arguments of the image encoder, for one standard image: one crop."""
        return {pixels_name(type(self.body)): self.blank(1, 3, *_pair(self.config.vision_config.image_size))}

    def video(self, frames: int) -> dict[str, Any]:
        """The same of the video encoder, for one video, where the class has such a one."""
        return {"pixel_values_videos": self.blank(1, frames, 3, *_pair(self.config.vision_config.image_size))}

    def blank(self, *shape: int) -> Tensor:
        """Pixels without values."""
        return torch.empty(*shape, dtype=self.body.dtype, device="meta")

    def packing(self, modality: str, given: Mapping[str, Any]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """How anything known of each image's patches, [crops, patches, C], takes the way that features take to the
        decoder's sequence, crop after crop; `given` are the encoder's arguments."""
        return lambda patches: [crops.flatten(0, 1) for crops in patches]

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        """Crops of each image, one by one, or frames of each video."""
        pixels = pixels_in(given, modality)
        return [pixels.shape[1] if modality == "video" else 1] * len(pixels)

    def crops(self, modality: str, given: Mapping[str, Any], output: Any) -> list[Tensor]:
        """Features [crops, patches, D] of each image or video behind the projector and before packing."""
        return [] if self.features is None else list(self.features.split(self.counts(modality, given)))

    def joined(self, modality: str) -> int:
        """The side in patches of the square that enters the projector as one."""
        return 1

    def pooled(self, modality: str, values: Tensor) -> Tensor:
        """Values [crops, patches, C] of the tower's patches as those of what enters the projector: the same, or where
        it is made of several patches their mean."""
        side = self.joined(modality)
        return values if side == 1 else squares(values, side)

    def newline(self, modality: str) -> tuple[Tensor, str] | None:
        """The vector that separates rows of a plan's layout, and whether it comes behind each `row` or at the `end`."""
        return None

    def grid(self, modality: str = "image") -> tuple[int, int]:
        """What enters the projector of one crop, by height and width."""
        vision, side = self.config.vision_config, self.joined(modality)
        sizes = zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)
        height, width = (size // patch // side for size, patch in sizes)
        return height, width

    def crop_grids(self, modality: str, given: Mapping[str, Any], count: int) -> list[tuple[int, int]]:
        """The same of each of `count` images' crops, or videos' frames."""
        return [self.grid(modality)] * count

    def crop_pixels(self, modality: str, given: Mapping[str, Any]) -> list[Tensor] | None:
        """Pixels [crops, 3, H, W] of each image or video, where the encoder takes whole crops."""
        pixels = pixels_in(given, modality)
        if pixels.dim() == 4:
            return list(pixels.unsqueeze(1))
        counts = self.counts(modality, given)
        return [own[:count] for own, count in zip(pixels, counts, strict=True)] if pixels.dim() == 5 else None

    def mosaics(self, modality: str, given: Mapping[str, Any]) -> list[tuple[int, int] | None]:
        """Rows and columns of the crops that stand behind the thumbnail of each image; None where there are none."""
        return [None] * len(self.counts(modality, given))

    # -- the encoder ---------------------------------------------------------------------------------------------------

    @property
    def tower_recorders(self) -> dict[int, Recorder]:
        """Recorders by layer of the tower that is at work in this thread, or was last."""
        return self.all_recorders.get(self.towers[self.encoding.modality], {})

    def outside(self, modality: str) -> int:
        """How many class tokens of a crop its features come without."""
        return int(self.class_token and modality not in self.class_features)

    def encoder(self, name: str | None = None) -> Sequence[Any]:
        """All layers of a tower, left out that of images; none where they cannot be read."""
        tower: nn.Module = getattr(self.body, self.towers["image"] if name is None else name)
        return [m for m in tower.modules() if hasattr(getattr(m, self.tower_attention, None), "q_proj")]

    def tower(self) -> Sequence[Any]:
        """The tower's layers up to the one whose output becomes features; none where they cannot be read."""
        last = getattr(self.config, "vision_feature_layer", -1)
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
        if not layers or "tower" not in self.signals:
            return None
        attention, special = getattr(layers[0], self.tower_attention), int(self.class_token)
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
        return getattr(self.config, "vision_feature_select_strategy", "full") == "default"

    @property
    def tower_head(self) -> int:
        """Channels of a head of the tower."""
        size: int = getattr(self.tower()[0], self.tower_attention).head_dim
        return size

    def _watch_encoder(self, modality: str) -> Callable[[], Any]:
        """Notes how each batch of images or videos was packed. The encoder is a method of the model that `generate`
        calls by itself, so it is wrapped on the instance, where hooks do not reach."""
        name = f"get_{modality}_features"
        original = getattr(self.body, name)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._own, "encodes", False):  # a class may have its images' encoder read videos
                return original(*args, **kwargs)
            self._own.encodes = True
            try:
                return watched(*args, **kwargs)
            finally:
                self._own.encodes = False

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = arguments(self.body, name, args, kwargs)
            counts = self.counts(modality, given)
            if not counts or min(counts) < 1:
                part = "video without a frame" if modality == "video" else "prompt's images without pixels"
                raise PrunelabError(f"the model was given a {part}; give at least one")
            self._own.features = None
            encoding = self._own.encoding = TowerPass(modality=modality, given=given)
            encoding.recorders = self.tower_recorders
            output = original(*args, **kwargs)
            pack, seen = self.packing(modality, given), self.encoding
            self._take_recorders()
            features = self.crops(modality, given, output)
            lengths = [len(tokens) for tokens in pack([torch.empty(*f.shape[:2], 1, device="meta") for f in features])]
            grids, first = self.crop_grids(modality, given, len(features)), output.pooler_output[0]
            made = Encoded(lengths, features, pack, grids, seen, first, self.mosaics(modality, given))
            self.encoded = self.encoded | {modality: made}
            return output

        return replaced(self.body, name, encode)

    def _watch_placeholders(self) -> Callable[[], Any]:
        """Says in one line how many placeholders a prompt lacks, where the model would raise an error of its own."""
        name = "get_placeholder_mask"
        original = getattr(self.body, name, None)
        if original is None:
            return lambda: None

        @functools.wraps(original)
        def match(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except (ValueError, RuntimeError):  # the model counts them itself; so as to look once, we ask only now
                given = arguments(self.body, name, args, kwargs)
                ids = given.get("input_ids")
                for modality, token in self.tokens.items():
                    features = given.get(f"{modality}_features")
                    if features is None or ids is None:
                        continue
                    placeholders = int((ids == getattr(self.config, token)).sum())
                    count = features.numel() // given["inputs_embeds"].shape[-1]
                    if placeholders != count:
                        raise disagreement(placeholders, count) from None
                raise

        return replaced(self.body, name, match)

    def _take_recorders(self) -> None:
        """What the tower's layers worked on is kept, whatever they work on next."""
        self.encoding.recorders = {layer: recorder.taken() for layer, recorder in self.tower_recorders.items()}
