"""PaliGemma, through transformers' own class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunelab.common.core.attention_interface import with_cache
from prunelab.common.tokens.adapters.vlm_llava import Llava
from prunelab.common.tokens.adapters.vlm_prompt import Prompt


@dataclass(frozen=True)
class Cached(Prompt):
    """A prompt by its shapes, with a cache at hand: without one the class looks at the values of its positions."""

    def more(self, model: Any) -> dict[str, Any]:
        from transformers import DynamicCache

        return with_cache({}, DynamicCache(config=model.config.get_text_config()))


class PaliGemma(Llava):
    """PaliGemma: one crop an image. Image and prompt see all of each other, so a token that is left sees all that are
    left; what is written sees what is before it. PaliGemma 2, whose decoder has windows, is refused.
    """

    family = "paligemma"
    model_classes = ("transformers.models.paligemma.modeling_paligemma.PaliGemmaForConditionalGeneration",)
    prefixes = True

    def prompt(self, frames: int = 0, text: int | None = None) -> Prompt:
        return Cached(**vars(super().prompt(frames, text)))

    def shaped(self, given: Mapping[str, Any]) -> Prompt:
        return Cached(**vars(super().shaped(given)))

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(ids)}
