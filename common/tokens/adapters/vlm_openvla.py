"""OpenVLA, through our own class of LLaVA's modules (`prunelab.common.backbones.openvla`)."""

from __future__ import annotations

from typing import Any

import torch

from prunelab.common.tokens.adapters.vlm import VisionLanguage
from prunelab.common.tokens.adapters.vlm_llava import Llava


class OpenVLA(Llava):
    """OpenVLA: the patches of two encoders, side by side, one picture a control step. No token leaves inside them. A
    chunk of actions is read off a sequence that sees all of itself.
    """

    family = "openvla"
    model_classes = ("prunelab.common.backbones.openvla.OpenVLAForConditionalGeneration",)
    signals = {where: known for where, known in VisionLanguage.signals.items() if where != "tower"}
    prefixes = True
    class_token = False

    def pixels(self) -> dict[str, Any]:
        height, width = self.body.vision_tower.featurizer.patch_embed.img_size
        return {"pixel_values": torch.empty(1, 6, height, width, dtype=self.body.dtype, device="meta")}

    def grid(self) -> tuple[int, int]:
        size: tuple[int, int] = self.body.vision_tower.grid
        return size
