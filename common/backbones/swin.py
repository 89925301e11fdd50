"""Swin (Liu et al., ICCV 2021) below a detector, on transformers' Swin, and the names of the official weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import SwinBackbone, SwinConfig

from prunelab.common.backbones.checkpoint import Names

STAGES = ("stage2", "stage3", "stage4")

# width, layers of each stage, heads, side of a window
SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}


class Swin(nn.Module):
    """Levels at strides 8, 16 and 32, each behind a norm of its own. `tiny` was trained on pictures of 224 pixels,
    `base` and `large` on 384."""

    stride = 8

    def __init__(self, width: int, depths: Sequence[int], heads: Sequence[int], window: int) -> None:
        super().__init__()
        self.channels = tuple(width * 2**stage for stage in (1, 2, 3))
        config = SwinConfig(
            embed_dim=width,
            depths=list(depths),
            num_heads=list(heads),
            window_size=window,
            out_features=list(STAGES),
        )
        self.body = SwinBackbone(config)
        self.body.swin.layernorm = nn.Identity()  # behind the last stage, where levels are read before it

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.body(images).feature_maps)


def names(prefix: str) -> Names:
    """Ours for those of the official code, which detectors took over, below `prefix` (a pattern) for `backbone`."""
    ours, block = "backbone.body.swin.", r"layers\.(\d)\.blocks\.(\d+)\."
    there = ours + r"encoder.layers.\1.blocks.\2."
    return [
        (prefix + r"patch_embed\.proj\.", ours + "embeddings.patch_embeddings.projection."),
        (prefix + r"patch_embed\.norm\.", ours + "embeddings.norm."),
        (prefix + block + r"attn\.relative_position_index$", None),  # follows from the side of a window
        (prefix + block + r"attn\.relative_position_bias_table$",
         there + "attention.relative_position_bias.relative_position_bias_table"),
        (prefix + block + r"attn\.qkv\.", there + "attention.qkv_proj."),
        (prefix + block + r"attn\.proj\.", there + "attention.o_proj."),
        (prefix + block + r"norm1\.", there + "layernorm_before."),
        (prefix + block + r"norm2\.", there + "layernorm_after."),
        (prefix + block + r"mlp\.", there + "mlp."),
        (prefix + r"layers\.(\d)\.downsample\.", ours + r"encoder.layers.\1.downsample."),
        (prefix + r"norm([123])\.", lambda m: f"backbone.body.hidden_states_norms.stage{int(m[1]) + 1}."),
    ]  # fmt: skip
