"""Qwen2.5-VL, through transformers' own class: images and videos of any size, positions with three axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.adapters.vlm import VisionLanguage
from common.adapters.vlm_parts import Prompt


class Qwen25VL(VisionLanguage):
    """Qwen2.5-VL: two by two patches of the encoder make one token; a token's position has a time, a row and a column.

    Its encoder attends within windows and has no class token, so it gives no attention signals.
    """

    family = "qwen2_5_vl"
    model_classes = ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",)
    tokens = {"image": "image_token_id", "video": "video_token_id"}

    def pixels(self) -> dict[str, Any]:
        return self._pixels(torch.tensor([[1, *self.grid()]]))

    def _pixels(self, grid: Tensor) -> dict[str, Any]:
        vision = self.config.vision_config
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.empty(int(grid.prod(-1).sum()), patch, dtype=self.body.dtype, device="meta")
        places = torch.empty(len(pixels), 2, dtype=torch.long, device="meta")  # the encoder's own follow the grid
        return {"pixel_values": pixels, "image_grid_thw": grid, "image_position_ids": places}

    def grid(self) -> tuple[int, int]:
        return 32, 32  # assumption: an image of 448 pixels, since there is no standard size

    def tower(self) -> Any | None:
        return None

    @property
    def class_token(self) -> bool:
        return False

    def axes(self, positions: Tensor) -> Tensor:
        if positions.dim() == 2:
            return positions.expand(3, -1, -1)
        return positions[-3:]  # `generate` puts the text's own numbers in front

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        return [int(t) for t in self._grids(modality, given)[:, 0]]

    def _grids(self, modality: str, given: Mapping[str, Any]) -> Tensor:
        merge = self.config.vision_config.spatial_merge_size
        return given[f"{modality}_grid_thw"].cpu() // torch.tensor([1, merge, merge])

    def crops(self, modality: str, given: Mapping[str, Any], output: Any) -> list[Tensor]:
        counts = self.counts(modality, given)
        return [tokens.unflatten(0, (t, -1)) for tokens, t in zip(output.pooler_output, counts, strict=True)]

    def crop_grids(self, modality: str, given: Mapping[str, Any], features: list[Tensor]) -> list[tuple[int, int]]:
        return [(int(h), int(w)) for _, h, w in self._grids(modality, given)]

    def packing(self, modality: str, given: Mapping[str, Any]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return lambda patches: [image.flatten(0, 1) for image in patches]

    def _count(self, prompt: Prompt) -> int:
        return int(self._grids(prompt.modality, prompt.pixels).prod(-1).sum())
