"""The ViTs of SWAG (Singh et al., CVPR 2022, arXiv 2201.08371), fine-tuned on ImageNet-1k: timm's ViT with weights that
lie as torchvision publishes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunelab.common.backbones.checkpoint import fill, read

NAMES = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "head."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
)


def official_name(name: str) -> str:
    """timm's name of a weight of the published file."""
    for pattern, here in NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", here, name)
    return name


def swag(**settings: Any) -> VisionTransformer:
    """A model of the given settings, at random."""
    return VisionTransformer(**settings)


def vit_b_16() -> nn.Module:
    """ViT-B/16 at 384 pixels."""
    return swag(img_size=384)


def vit_l_16() -> nn.Module:
    """ViT-L/16 at 512 pixels."""
    return swag(img_size=512, embed_dim=1024, depth=24, num_heads=16)


def vit_h_14() -> nn.Module:
    """ViT-H/14 at 518 pixels."""
    return swag(img_size=518, patch_size=14, embed_dim=1280, depth=32, num_heads=16)


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load torchvision's checkpoint, with every name and shape checked."""
    fill(model, {official_name(name): weight for name, weight in read(Path(path)).items()}, path)
