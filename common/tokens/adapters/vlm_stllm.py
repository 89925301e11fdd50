"""ST-LLM, which transformers has no class for and is our composition (`prunelab.common.backbones.stllm`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.adapters.vlm_prompt import Prompt

QUESTION = 32  # tokens of the Q-Former's question in a standard prompt


class Stllm(VisionLanguage):
    """ST-LLM: videos alone, whose frames are told by the Q-Former's tokens. These have no place in the picture, and
    stand in one row; of patches, which the Q-Former reads, none leaves, and nothing is known of them behind it. Where
    frames are mixed, those that stay count."""

    family = "stllm"
    model_classes = ("prunelab.common.backbones.stllm.StllmForConditionalGeneration",)
    tokens = {"video": "video_token_id"}
    signals = VisionLanguage.without("tower", "encoded")

    def prompt(self, frames: int = 0, text: int | None = None) -> Prompt:
        return super().prompt(frames or 1, text)

    def video(self, frames: int) -> dict[str, Any]:
        asked = torch.zeros(1, QUESTION, dtype=torch.long, device="meta")
        return {**super().video(frames), "qformer_input_ids": asked}

    def shaped(self, given: Mapping[str, Any]) -> Prompt:
        plain = super().shaped({key: value for key, value in given.items() if key != "qformer_attention_mask"})
        return replace(plain, pixels={key: value.to("meta") for key, value in plain.pixels.items()})

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        pixels = given["pixel_values_videos"]
        return [len(self.body.multi_modal_projector.frames(pixels.shape[1]))] * len(pixels)

    def grid(self, modality: str = "image") -> tuple[int, int]:
        return 1, self.config.num_query_tokens

    def crop_pixels(self, modality: str, given: Mapping[str, Any]) -> list[Tensor]:
        pixels = given["pixel_values_videos"]
        return list(pixels[:, self.body.multi_modal_projector.frames(pixels.shape[1])])
