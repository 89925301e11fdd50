"""What the foreground scorer learns from: tokens inside boxes of their level's size, and a focal loss (section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from prunelab.common.core.errors import PrunelabError
from prunelab.methods.focus_detr.modules import FocusParts

STRIDES = (8, 16, 32, 64)
# Largest distance in pixels from a token to a side of its box, for each level. The paper speaks of scale ranges that
# overlap by half; these are the released ones, which do not.
LIMITS = ((-1, 64), (64, 128), (128, 256), (256, 999999))
WEIGHT = 1.5  # of the loss in training


def foreground_targets(
    boxes: Tensor,
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int] = STRIDES,
    limits: Sequence[tuple[float, float]] = LIMITS,
) -> Tensor:
    """1 for foreground tokens and 0 for others, [B, N].

    boxes [B, m, 4] xyxy in pixels of the padded input; unused rows hold -1 and contain no token. A token is
    foreground where its centre lies strictly inside some box whose farthest side is within its level's limits.
    """
    if not len(shapes) == len(strides) == len(limits):
        raise PrunelabError(f"{len(shapes)} levels need as many strides and limits, not {len(strides)}, {len(limits)}")
    levels = []
    for (height, width), stride, (low, high) in zip(shapes, strides, limits):
        y, x = torch.meshgrid(
            torch.arange(height, device=boxes.device) * stride + stride // 2,
            torch.arange(width, device=boxes.device) * stride + stride // 2,
            indexing="ij",
        )
        centre = torch.stack([x, y], -1).view(1, -1, 1, 2)
        sides = torch.cat([centre - boxes[:, None, :, :2], boxes[:, None, :, 2:] - centre], -1)  # [B, n, m, 4]
        farthest = sides.amax(-1)
        inside = (sides.amin(-1) > 0) & (farthest > low) & (farthest <= high)
        levels.append(inside.any(-1))
    return torch.cat(levels, 1).float()


def focal_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss [B] summed over all tokens of an image, padding included, per foreground token. Both [B, N]."""
    losses = sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0, reduction="none")
    return losses.sum(1) / targets.sum(1).clamp(min=1)


def foreground_loss(
    parts: FocusParts,
    targets: Sequence[Mapping[str, Tensor]],
    sizes: Tensor,
    strides: Sequence[int] = STRIDES,
    limits: Sequence[tuple[float, float]] = LIMITS,
) -> Tensor:
    """The weighted loss of the scores of the last forward pass, to be added to the detector's.

    targets: one dictionary an image with `boxes` [m, 4] cxcywh as shares of the image; sizes [B, 2] width and height
    of each image in pixels before padding.
    """
    if parts.scored is None:
        raise PrunelabError("there are no scores to learn from; run the model in training mode with the method applied")
    most = max((len(t["boxes"]) for t in targets), default=0)
    boxes = sizes.new_full((len(targets), max(1, most), 4), -1.0, dtype=torch.float32)
    for row, target, size in zip(boxes, targets, sizes, strict=True):
        row[: len(target["boxes"])] = box_convert(target["boxes"].float(), "cxcywh", "xyxy") * size.repeat(2)
    wanted = foreground_targets(boxes, parts.scored.shapes, strides, limits)
    return WEIGHT * focal_sums(parts.scored.logits, wanted).mean()
