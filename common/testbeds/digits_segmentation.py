"""The segmenter that finds digits in scenes (`common.data.segmentation`): a plain ViT of 12 blocks with three heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunelab.common.backbones.segvit import Prediction, Segmenter, segmenter
from prunelab.common.data import segmentation
from prunelab.common.testbeds.base import Testbed
from prunelab.common.testbeds.digits_vit import sines
from prunelab.common.testbeds.tuned import Tuned

QUICK, FULL, BATCH, TEST_SEED = 200, 1000, 100, 1


@dataclass(frozen=True)
class DigitsSegmentation(Testbed):
    """As deep as a ViT-B, with heads behind the same blocks (5, 7 and 11), and as narrow as the task allows.

    ramp: share of the training over which scenes grow to full difficulty.
    """

    steps: int = 6500
    batch: int = 32
    rate: float = 2e-3
    width: int = 48
    heads: int = 3
    depth: int = 12
    mlp_ratio: float = 2.0
    stages: tuple[int, ...] = (5, 7, 11)
    head_width: int = 32
    head_heads: int = 2
    head_layers: int = 1
    ramp: float = 0.3

    name: ClassVar[str] = "digits_segmentation"
    needs: ClassVar[tuple[str, ...]] = ("torch", "timm", "scikit-learn")

    def build(self) -> nn.Module:
        model = segmenter(
            classes=segmentation.CLASSES, window=segmentation.SIDE, patch=segmentation.CELL, channels=1,
            width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio, stages=self.stages,
            head_width=self.head_width, head_heads=self.head_heads, head_layers=self.head_layers,
        )  # fmt: skip
        # Xavier throughout: the published deviation of 0.02 is too small at this width.
        model.backbone.init_weights("jax")
        for head in model.heads:
            for module in head.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
        with torch.no_grad():
            model.backbone.pos_embed.copy_(0.5 * sines(self.width, segmentation.SIDE // segmentation.CELL))
        return model

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        assert isinstance(model, Segmenter)
        hardest = min(1.0, progress / self.ramp) if self.ramp else 1.0
        x, labels = segmentation.scenes("train", self.batch, generator, hardest, deformed=True)
        return deep_loss(model.stages(x), labels)

    def evaluate(self, model: nn.Module, quick: bool = False) -> dict[str, float]:
        count = QUICK if quick else FULL
        x, labels = segmentation.scenes("test", count, TEST_SEED)
        maps = torch.cat([model(part).argmax(1) for part in x.split(BATCH)])
        table = segmentation.confusion(maps, labels, segmentation.CLASSES)
        shares = {"miou": segmentation.iou(table).nanmean(), "accuracy": table.diag().sum() / table.sum()}
        return {name: float(value) for name, value in shares.items()} | {"scenes": count}


# -- fine-tuned with tokens leaving early ------------------------------------------------------------------------------


@dataclass(frozen=True)
class DigitsSegmentationDToP(Tuned):
    """After DToP: what every head says of the whole grid is trained, with the tokens that left as they left.

    The authors' recipe, scaled. They go on for a quarter of the steps, at a fifteenth to a fiftieth of a usual peak
    rate, with hardly any weight decay. Here it is a tenth of the steps at a tenth of the rate.
    """

    steps: int = 600
    batch: int = 32
    rate: float = 2e-4
    decay: float = 0.01
    method: str = "dtop(threshold=0.95)"
    budget: str = "1.0"

    name: ClassVar[str] = "digits_segmentation_dtop"
    needs: ClassVar[tuple[str, ...]] = DigitsSegmentation.needs

    def base(self) -> Testbed:
        return DigitsSegmentation(batch=self.batch)

    def loss(self, model: nn.Module, progress: float, generator: torch.Generator) -> Tensor:
        x, labels = segmentation.scenes("train", self.batch, generator, deformed=True)
        with self.pruned(model) as handle:
            model(x)
            return deep_loss(handle.adapter.stages, labels)


# -- SegViT's loss ---------------------------------------------------------------------------------------------------


def deep_loss(stages: Sequence[Prediction], labels: Tensor) -> Tensor:
    """The losses of all heads together, on the testbed's grid."""
    grid = (segmentation.SIDE // segmentation.CELL,) * 2
    return torch.stack([atm_loss(prediction, grid, labels) for prediction in stages]).sum()


def atm_loss(
    prediction: Prediction,
    grid: tuple[int, int],
    labels: Tensor,
    *,
    class_weight: float = 1.0,
    mask_weight: float = 20.0,
    dice_weight: float = 1.0,
    absent: float = 0.1,
) -> Tensor:
    """SegViT's loss of one head: is the class there (cross-entropy), and where (focal and dice loss of its mask).

    prediction: of the whole grid; labels [B, H, W] int64, where values outside the classes belong to no mask.
    Masks are resized to the labels; only those of classes in the image count, with equal weight in the batch. absent:
    weight of classes that are not there. The weights are those of the released configurations of DToP.
    """
    assert prediction.presence is not None  # the loss of heads that ask whether a class is there
    present, target = masks_of(labels, prediction.masks.shape[1])
    logits = F.interpolate(
        prediction.masks.unflatten(-1, grid), labels.shape[-2:], mode="bilinear", align_corners=False
    )
    count = present.sum().clamp_min(1)

    weight = torch.where(present, 1.0, absent)
    entropy = F.binary_cross_entropy_with_logits(
        prediction.presence.squeeze(-1), present.float(), weight, reduction="sum"
    )
    focal = focal_loss(logits, target).mean((-2, -1))
    dice = dice_loss(logits.sigmoid(), target)
    where = ((mask_weight * focal + dice_weight * dice) * present).sum() / count
    return class_weight * entropy / weight.sum() + where


def masks_of(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Which classes are in each image [B, C] bool, and their masks [B, C, H, W] of zeros and ones."""
    target = (labels.unsqueeze(1) == torch.arange(classes, device=labels.device).view(-1, 1, 1)).float()
    return target.amax((-2, -1)) > 0, target


def focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of every element (Lin et al., ICCV 2017): cross-entropy, less the surer the prediction is."""
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    right = p * target + (1 - p) * (1 - target)
    return (alpha * target + (1 - alpha) * (1 - target)) * (1 - right) ** gamma * entropy


def dice_loss(p: Tensor, target: Tensor) -> Tensor:
    """One minus the overlap of masks [..., H, W] with their targets, smoothed by one pixel."""
    shared = (p * target).sum((-2, -1))
    return 1 - (2 * shared + 1) / (p.sum((-2, -1)) + target.sum((-2, -1)) + 1)
