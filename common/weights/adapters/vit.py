"""Vision transformers of timm, whose attention has q k v in one projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prunelab.common.weights.adapters.blocks import Blocks
from prunelab.common.weights.adapters.images import check_image
from prunelab.common.weights.adapters.projections import IN, length
from prunelab.common.weights.targets import Target


class VisionTransformer(Blocks):
    """ViT, DeiT, CLIP, DINOv2, MAE and the others of timm's class. A calibration sample is an image [C, H, W]."""

    family = "vit"
    model_classes = ("timm.models.vision_transformer.VisionTransformer",)
    layers = "blocks"
    attention = "attn"
    heads = {**dict.fromkeys("qkv", "attn.qkv"), "o": "attn.proj"}
    mlp = {"up": "mlp.fc1", "down": "mlp.fc2"}

    def run(self, sample: Tensor) -> Any:
        return self.model(sample.unsqueeze(0))

    def check_sample(self, sample: Tensor) -> None:
        check_image(sample, self.model.patch_embed.proj.in_channels)

    def head_entries(self, block: int, modules: Mapping[str, Any]) -> dict[str, Tensor]:
        attention = self._part(block, self.attention)
        normed = not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
        if normed or getattr(attention, "gate", None) is not None:
            return {}  # a norm or gate over all heads changes with every head that leaves
        return super().head_entries(block, modules)

    def _channels(self, block: int) -> list[Target]:
        norm = getattr(self._part(block, "mlp"), "norm", None)
        if norm is not None and not isinstance(norm, nn.Identity):
            return []  # a norm over all channels changes with every one that leaves
        return super()._channels(block)

    def resize(self, block: int) -> None:
        attention = self._part(block, self.attention)
        attention.attn_dim = length(attention.proj, IN)
        attention.num_heads = attention.attn_dim // attention.head_dim

    def finish(self) -> bool:
        self.drop_layers()
        return False
