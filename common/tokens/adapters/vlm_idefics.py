"""Idefics 3 and SmolVLM, through transformers' own classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.adapters.vlm_prompt import Prompt


class _AllReal(TorchFunctionMode):
    """The class drops crops and hides patches that are all zeros, which shapes do not say: on the meta device none
    are."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.device.type == "meta":
            if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
                return first
            if function is Tensor.__bool__:
                return True
            if function is Tensor.tolist:
                return [1] * len(first)
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Crops(Prompt):
    """A prompt of one crop, by its shapes."""

    def encode(self, model: Any) -> list[Tensor]:
        with _AllReal():
            return super().encode(model)


class Idefics3(VisionLanguage):
    """Idefics 3 and SmolVLM: squares of patches are joined before the projector.

    The crops of an image, and the frames of a video, stand apart in the prompt, with their places between them, so each
    is an image of its own for plans that are made of one alone. No token leaves inside the encoder, where a part of a
    square could; what a token receives there is the mean over its patches.
    """

    family = "idefics3"
    model_classes = (
        "transformers.models.idefics3.modeling_idefics3.Idefics3ForConditionalGeneration",
        "transformers.models.smolvlm.modeling_smolvlm.SmolVLMForConditionalGeneration",
    )
    signals = VisionLanguage.without("tower")
    towers = {"image": "vision_model"}
    decoders = "text_model"
    projector = "connector.modality_projection"

    def pixels(self) -> dict[str, Any]:
        (crop,) = super().pixels().values()
        return {"pixel_values": crop.unsqueeze(0)}

    def prompt(self, frames: int = 0, text: int | None = None) -> Prompt:
        return Crops(**vars(super().prompt(frames, text)))

    def shaped(self, given: Mapping[str, Any]) -> Prompt:
        plain = super().shaped(given)
        crops = sum(self.counts("image", given))
        side = given["pixel_values"].shape[-2:]
        return Crops({"pixel_values": self.blank(crops, 1, 3, *side)}, plain.text)

    def crop_pixels(self, modality: str, given: Mapping[str, Any]) -> list[Tensor]:
        crops = given["pixel_values"].flatten(0, 1)
        if crops.device.type != "meta":
            crops = crops[(crops != 0).flatten(1).any(1)]
        return list(crops.unsqueeze(1))

    def counts(self, modality: str, given: Mapping[str, Any]) -> list[int]:
        return [1] * len(self.crop_pixels(modality, given))

    def joined(self, modality: str) -> int:
        side: int = self.config.scale_factor
        return side
