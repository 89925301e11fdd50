"""OpenVLA, through our own class of LLaVA's modules (`prunelab.common.backbones.openvla`)."""

from __future__ import annotations

from typing import Any

from prunelab.common.tokens.adapters.vlm_llava import Llava


class OpenVLA(Llava):
    """OpenVLA: the patches of two encoders, side by side, one picture a control step. No token leaves inside them. A
    chunk of actions is read off a sequence that sees all of itself.
    """

    family = "openvla"
    model_classes = ("prunelab.common.backbones.openvla.OpenVLAForConditionalGeneration",)
    signals = Llava.without("tower")
    prefixes = True
    class_token = False

    def pixels(self) -> dict[str, Any]:
        return {"pixel_values": self.blank(1, 6, *self.body.vision_tower.featurizer.patch_embed.img_size)}

    def grid(self, modality: str = "image") -> tuple[int, int]:
        size: tuple[int, int] = self.body.vision_tower.grid
        return size
