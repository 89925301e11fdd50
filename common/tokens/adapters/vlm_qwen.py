"""Qwen2.5-VL, through transformers' own class: images and videos of any size, positions with three axes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.hooks import arguments, replaced, run_all
from prunelab.common.tokens.adapters.base import Application
from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.adapters.vlm_prompt import Prompt, disagreement


class Qwen25VL(VisionLanguage):
    """Qwen2.5-VL: two by two patches of the encoder make one token; a token's position has a time, a row and a column.

    Its encoder attends within windows and has no class token, so it gives no attention signals.
    """

    family = "qwen2_5_vl"
    model_classes = ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",)
    tokens = {"image": "image_token_id", "video": "video_token_id"}

    def pixels(self) -> dict[str, Any]:
        return self._pixels("image", torch.tensor([[1, *self.grid()]]))

    def video(self, frames: int) -> dict[str, Any]:
        pairs = -(-frames // self.config.vision_config.temporal_patch_size)
        return self._pixels("video", torch.tensor([[pairs, *self.grid()]]))

    def _pixels(self, modality: str, grid: Tensor) -> dict[str, Any]:
        vision = self.config.vision_config
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.empty(int(grid.prod(-1).sum()), patch, dtype=self.body.dtype, device="meta")
        places = torch.empty(len(pixels), 2, dtype=torch.long, device="meta")  # the encoder's own follow the grid
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        return {name: pixels, f"{modality}_grid_thw": grid, f"{modality}_position_ids": places}

    def shaped(self, given: Mapping[str, Any]) -> Prompt:
        plain = super().shaped(given)
        return replace(plain, pixels=self._pixels(plain.modality, given[f"{plain.modality}_grid_thw"]))

    def grid(self) -> tuple[int, int]:
        return 32, 32  # assumption: an image of 448 pixels, since there is no standard size

    def tower(self) -> Sequence[Any]:
        return []

    @property
    def class_token(self) -> bool:
        return False

    def install(self, application: Application) -> Callable[[], None]:
        remove = super().install(application)
        original = self.body.get_rope_index

        @functools.wraps(original)
        def number(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except (RuntimeError, StopIteration):  # placeholders that no grid accounts for
                given = arguments(self.body, "get_rope_index", args, kwargs)
                grids = {m: given.get(f"{m}_grid_thw") for m in self.tokens}
                features = sum(
                    int(self._grids(m, given).prod(-1).sum()) for m, grid in grids.items() if grid is not None
                )
                visual = [given["input_ids"] == getattr(self.config, token) for token in self.tokens.values()]
                raise disagreement(sum(int(mask.sum()) for mask in visual), features) from None

        removers = [remove, replaced(self.body, "get_rope_index", number)]
        return lambda: run_all(removers)

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        kinds = (ids == self.config.image_token_id).int() + 2 * (ids == self.config.video_token_id).int()
        return {"mm_token_type_ids": kinds}

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

    def visual_tokens(self, prompt: Prompt) -> int:
        return int(self._grids(prompt.modality, prompt.pixels).prod(-1).sum())
