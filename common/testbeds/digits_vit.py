"""The vision transformer that names a digit in a scene (`common.data.digits`): plain timm, 12 blocks, class token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.data import digits
from prunelab.common.testbeds.base import Testbed

QUICK, FULL, BATCH, TEST_SEED = 500, 4000, 250, 1


@dataclass(frozen=True)
class DigitsViT(Testbed):
    """As deep as DeiT, so that block numbers mean the same, and as narrow as the task allows.

    ramp: share of the training over which clutter grows from none to full contrast, so that digits are found early.
    smoothing: of the labels.

    layer_decay: learning rate of a block as a share of the next block's. It decides where the class token reads the
    digit. With equal rates it does so in the first three blocks, and losing patches behind them at random costs 5
    points where it costs over 40 with slow early blocks, which leave the reading to late ones (the 5 points are from a
    trial that was stopped early, not from a clean ablation). How methods rank depends on the seed: `seeds.json`.
    """

    steps: int = 2000
    batch: int = 64
    rate: float = 3e-3
    width: int = 48
    heads: int = 3
    depth: int = 12
    mlp_ratio: float = 2.0
    ramp: float = 0.3
    layer_decay: float = 0.7
    smoothing: float = 0.05

    name: ClassVar[str] = "digits_vit"
    needs: ClassVar[tuple[str, ...]] = ("torch", "timm", "scikit-learn")

    def build(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=digits.GRID * digits.CELL, patch_size=digits.CELL, in_chans=1, num_classes=10,
            embed_dim=self.width, depth=self.depth, num_heads=self.heads, mlp_ratio=self.mlp_ratio,
            weight_init="jax",  # Xavier: timm's default deviation of 0.02 is too small at this width
        )  # fmt: skip
        # Places are learned from here on; starting from sines saves the time to find out who is whose neighbour.
        with torch.no_grad():
            model.pos_embed[:, 1:] = 0.5 * sines(self.width, digits.GRID)
            model.pos_embed[:, 0] = 0
        return model

    def scale(self, parameter: str) -> float:
        part, _, rest = parameter.partition(".")
        if part == "blocks":
            block = int(rest.split(".")[0])
        else:  # what comes before the blocks learns like the first, what comes behind them like the last
            block = 0 if part in ("patch_embed", "pos_embed", "cls_token") else self.depth - 1
        return self.layer_decay ** (self.depth - 1 - block)

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        clutter = min(1.0, progress / self.ramp) if self.ramp else 1.0
        x, y = digits.scenes("train", self.batch, generator, clutter, deformed=True)
        return F.cross_entropy(model(x), y, label_smoothing=self.smoothing)

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        count = QUICK if quick else FULL
        x, y = digits.scenes("test", count, TEST_SEED)
        right = sum(int((model(x[i : i + BATCH]).argmax(1) == y[i : i + BATCH]).sum()) for i in range(0, count, BATCH))
        return {"accuracy": right / count, "scenes": count}


def sines(width: int, side: int) -> Tensor:
    """Sines and cosines of column and row [side * side, width], at wavelengths from 6 cells to several scenes."""
    rates = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * rates for place in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
