"""LV-ViT (Jiang et al., NeurIPS 2021, arXiv 2104.10858): timm's ViT behind a stem of four convolutions, with weaker
residual branches, whose patches have a say in the class.

The published weights are those of the authors' code (zihangJiang/TokenLabeling, Apache-2.0), read under timm's names.
A branch divided by `skip_lam` is a layer scale of its inverse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prunelab.common.backbones.checkpoint import fill, read

STEM = 64  # channels of its first convolutions
AUXILIARY = 0.5  # what the patches' best logits count beside the class token's


class Stem(nn.Module):
    """Images [B, 3, H, W] to patches [B, N, D]: three convolutions at half the resolution, then one over what is left
    of a patch."""

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 384, **_: Any
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.grid_size = tuple(size // patch_size for size in self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv1 = nn.Conv2d(in_chans, STEM, 7, stride=2, padding=3, bias=False)
        self.conv2 = nn.Conv2d(STEM, STEM, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(STEM, STEM, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(STEM) for _ in range(3))
        self.proj = nn.Conv2d(STEM, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(convolution(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)


class LVViT(VisionTransformer):
    """Images [B, 3, H, W] to logits [B, classes]: the class token's, and half of the best of all patches, class by
    class. `pools_most` says so to what takes patches away."""

    pools_most = True

    def __init__(self, skip_lam: float = 2.0, num_classes: int = 1000, **settings: Any) -> None:
        super().__init__(
            num_classes=num_classes, embed_layer=Stem, qkv_bias=False, init_values=1 / skip_lam, **settings
        )  # fmt: skip
        self.skip_lam = skip_lam
        self.aux_head = nn.Linear(self.embed_dim, num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return x[:, 0]
        logits: Tensor = self.head(x[:, 0])
        return logits + AUXILIARY * self.aux_head(x[:, 1:]).amax(1)


def lvvit(**settings: Any) -> LVViT:
    """A model of the given settings, at random."""
    return LVViT(norm_layer=nn.LayerNorm, **settings)


def lvvit_s() -> LVViT:
    """LV-ViT-S at 224 pixels: 26 million parameters."""
    return lvvit(embed_dim=384, depth=16, num_heads=6, mlp_ratio=3.0)


def load_checkpoint(model: LVViT, path: Path | str) -> None:
    """Load the authors' checkpoint, with every name and shape checked."""
    results = read(Path(path))
    scale = torch.full((model.embed_dim,), 1 / model.skip_lam)
    for block in range(len(model.blocks)):
        for branch in ("ls1", "ls2"):
            results.setdefault(f"blocks.{block}.{branch}.gamma", scale)
    fill(model, results, path)
