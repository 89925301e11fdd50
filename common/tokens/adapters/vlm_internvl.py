"""InternVL 2.5 and 3, through transformers' own class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.adapters.vlm_vision import squares


class InternVL(VisionLanguage):
    """InternVL: two by two patches of a tile's features are joined before the projector.

    The class is handed tiles, and frames of videos, without being told whose they are: each is an image of its own. No
    token leaves inside the encoder, where a part of a square could; what a token receives there is the mean over its
    patches.
    """

    family = "internvl"
    model_classes = ("transformers.models.internvl.modeling_internvl.InternVLForConditionalGeneration",)
    signals = {where: known for where, known in VisionLanguage.signals.items() if where != "tower"}
    tower_attention = "attention"

    def pixels(self) -> dict[str, Any]:
        height, width = self.config.vision_config.image_size
        return {"pixel_values": torch.empty(1, 3, height, width, dtype=self.body.dtype, device="meta")}

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        return [1] * len(given["pixel_values"])

    def packing(self, modality: str, given: Mapping[str, Any]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return lambda patches: [tile.flatten(0, 1) for tile in patches]

    def grid(self) -> tuple[int, int]:
        vision, ratio = self.config.vision_config, self.config.downsample_ratio
        height, width = (
            int(size // patch * ratio) for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return height, width

    def pooled(self, modality: str, values: Tensor) -> Tensor:
        return squares(values, round(1 / self.config.downsample_ratio))
