"""LLaVA-1.5, LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision, through transformers' own classes, and LLaVA-Video,
which has none there and is our reconstruction of OneVision's modules (`prunelab.common.backbones.llava_video`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelab.common.tokens.adapters.vlm import VisionLanguage


class Llava(VisionLanguage):
    """LLaVA-1.5: one crop an image, its patches are the visual tokens."""

    family = "llava"
    model_classes = ("transformers.models.llava.modeling_llava.LlavaForConditionalGeneration",)


class LlavaNext(VisionLanguage):
    """LLaVA-NeXT: a thumbnail, then the crops of a larger picture, row by row with a newline token behind each."""

    family = "llava_next"
    model_classes = ("transformers.models.llava_next.modeling_llava_next.LlavaNextForConditionalGeneration",)

    def pixels(self) -> dict[str, Any]:
        side = self.config.vision_config.image_size  # assumption: the standard image fills two by two crops
        return {"pixel_values": self.blank(1, 5, 3, side, side), "image_sizes": torch.tensor([[2 * side, 2 * side]])}

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.config
        if modality == "video":
            return super().counts(modality, given)
        side = config.vision_config.image_size
        return [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in given["image_sizes"]]

    def packing(self, modality: str, given: Mapping[str, Any]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        strategy = self.config.vision_feature_select_strategy
        if modality == "video":
            return super().packing(modality, given)

        def pack(patches: Sequence[Tensor]) -> list[Tensor]:
            newline = patches[0].new_zeros(patches[0].shape[-1])
            return self.body.pack_image_features(patches, given["image_sizes"], strategy, newline)[0]

        return pack

    def newline(self, modality: str) -> tuple[Tensor, str] | None:
        return None if modality == "video" else (self.body.image_newline, "row")

    def mosaics(self, modality: str, given: Mapping[str, Any]) -> list[tuple[int, int] | None]:
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        config = self.config
        if modality == "video":
            return super().mosaics(modality, given)
        shapes = [
            get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in given["image_sizes"]
        ]
        counts = self.counts(modality, given)
        return [shape if crops > 1 else None for shape, crops in zip(shapes, counts, strict=True)]


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT, and videos whose frames are pooled before the projector. No token leaves
    inside the encoder, where a part of what is pooled could."""

    family = "llava_next_video"
    model_classes = (
        "transformers.models.llava_next_video.modeling_llava_next_video.LlavaNextVideoForConditionalGeneration",
    )
    tokens = {"image": "image_token_id", "video": "video_token_id"}
    signals = LlavaNext.without("tower")

    def joined(self, modality: str) -> int:
        return self.config.spatial_pool_stride if modality == "video" else 1


class Pllava(LlavaNextVideo):
    """PLLaVA: as LLaVA-NeXT-Video, with frames that are pooled behind the projector, so that no token leaves before."""

    family = "pllava"
    model_classes = ("prunelab.common.backbones.pllava.PllavaForConditionalGeneration",)
    signals = LlavaNextVideo.without("tower", "encoded")


class VideoLlava(Llava):
    """Video-LLaVA: images as LLaVA-1.5, and videos through an encoder of their own, whose frames bring the encoder's
    class token along: it stands before a frame's patches and stays, except where the decoder's sequence is pruned."""

    family = "video_llava"
    model_classes = ("transformers.models.video_llava.modeling_video_llava.VideoLlavaForConditionalGeneration",)
    tokens = {"image": "image_token_id", "video": "video_token_id"}
    towers = {"image": "image_tower", "video": "video_tower"}
    class_features = frozenset({"video"})


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: images as LLaVA-NeXT, several images of a prompt as one crop each, and videos whose frames are
    pooled two by two, with one newline token behind the last."""

    family = "llava_onevision"
    model_classes = (
        "transformers.models.llava_onevision.modeling_llava_onevision.LlavaOnevisionForConditionalGeneration",
    )
    tokens = {"image": "image_token_id", "video": "video_token_id"}

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        images = given.get("batch_num_images")
        crops = super().counts(modality, given)
        if images is None or modality == "video":
            return crops
        alone = [n == 1 for n in images for _ in range(n)]
        return [n if single else 1 for n, single in zip(crops, alone, strict=True)]

    def packing(self, modality: str, given: Mapping[str, Any]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        def pack(patches: Sequence[Tensor]) -> list[Tensor]:
            newline = patches[0].new_zeros(patches[0].shape[-1])
            if modality == "video":
                return [self.pack_video(frames, newline) for frames in patches]
            most = given.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
            return self.body.pack_image_features(patches, given["image_sizes"], newline, most)[0]

        return pack

    def pack_video(self, frames: Tensor, newline: Tensor) -> Tensor:
        """Tokens [N, C] of a video's patches [frames, patches, C]."""
        return torch.cat([self.body.apply_pooling(frames).flatten(0, 1), newline.unsqueeze(0)])

    def newline(self, modality: str) -> tuple[Tensor, str] | None:
        return self.body.image_newline, "end" if modality == "video" else "row"


class LlavaVideo(LlavaOnevision):
    """LLaVA-Video: as OneVision, but with a newline token behind every row of a video's pooled frames."""

    family = "llava_video"
    model_classes = ("prunelab.common.backbones.llava_video.LlavaVideoForConditionalGeneration",)

    def pack_video(self, frames: Tensor, newline: Tensor) -> Tensor:
        packed: Tensor = self.body.with_newlines(frames, newline).flatten(0, 1)
        return packed

    def newline(self, modality: str) -> tuple[Tensor, str] | None:
        return self.body.image_newline, "row"
