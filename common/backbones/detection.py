"""What set-based detectors share: boxes, one-to-one matching, losses, contrastive denoising, and how their tokens are
scored: a scorer, and what the decoder looked at.

Boxes are [..., 4]. `cxcywh` means centre and size as shares of the image, `xyxy` corners. A target is a dictionary
with `labels` [m] int64 and `boxes` [m, 4] cxcywh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from prunelab.common.core.errors import PrunelabError

Target = Mapping[str, Tensor]


Matches = Sequence[tuple[Tensor, Tensor]]  # for each image: queries, and the target each of them stands for


ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


WEIGHTS = {"class": 1.0, "box": 5.0, "giou": 2.0}  # of the losses


COSTS = {"class": 2.0, "box": 5.0, "giou": 2.0}  # of the matching


def corners(boxes: Tensor) -> Tensor:
    """cxcywh -> xyxy."""
    return box_convert(boxes, "cxcywh", "xyxy")


def centres(boxes: Tensor) -> Tensor:
    """xyxy -> cxcywh."""
    return box_convert(boxes, "xyxy", "cxcywh")


def logit(x: Tensor, eps: float = 1e-3) -> Tensor:
    """The inverse of the sigmoid for x clamped to [0, 1], kept finite by eps as the DINO detectors do."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def clean_targets(targets: Sequence[Target], classes: int) -> list[dict[str, Tensor]]:
    """Targets a detector can learn from: boxes are cut at the image's border, and those that have no area left (also
    boxes wholly outside) are dropped. Raises PrunelabError for labels that do not exist and boxes that are no boxes."""
    cleaned = []
    for i, target in enumerate(targets):
        labels, boxes = target["labels"].long().flatten(), target["boxes"].float()
        if boxes.numel() == 0:
            boxes = boxes.reshape(0, 4)
        if boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) != len(labels):
            raise PrunelabError(f"target {i}: give boxes as [m, 4] cxcywh and as many labels, not {tuple(boxes.shape)}")
        if not bool(torch.isfinite(boxes).all()) or bool((boxes[:, 2:] < 0).any()):
            raise PrunelabError(f"target {i}: a box is not finite or has a negative size; boxes are cx, cy, w, h")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise PrunelabError(f"target {i}: a label is not in 0 to {classes - 1}, the classes of this detector")
        boxes = centres(corners(boxes).clamp(0, 1))
        visible = (boxes[:, 2:] > 0).all(1)
        cleaned.append({"labels": labels[visible], "boxes": boxes[visible]})
    return cleaned


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Matches:
    """The one-to-one assignment of least cost between queries and targets (DETR, equation 1; focal class cost).

    logits [B, Q, classes], boxes [B, Q, 4] cxcywh.
    """
    results = []
    for scores, box, target in zip(logits.float().sigmoid(), boxes.float(), targets, strict=True):
        likes = ALPHA * (1 - scores) ** GAMMA * -(scores + 1e-8).log()
        dislikes = (1 - ALPHA) * scores**GAMMA * -(1 - scores + 1e-8).log()
        cost = (
            COSTS["class"] * (likes - dislikes)[:, target["labels"]]
            + COSTS["box"] * torch.cdist(box, target["boxes"], p=1)
            - COSTS["giou"] * generalized_box_iou(corners(box), corners(target["boxes"]))
        )  # [Q, m]
        if not bool(torch.isfinite(cost).all()):
            raise PrunelabError("the detector's outputs are not finite; lower the learning rate or check the images")
        queries, wanted = linear_sum_assignment(cost.cpu().numpy())
        results.append((torch.from_numpy(queries).to(box.device), torch.from_numpy(wanted).to(box.device)))
    return results


def set_losses(
    logits: Tensor, boxes: Tensor, targets: Sequence[Target], matches: Matches, count: float
) -> dict[str, Tensor]:
    """Weighted focal class loss, L1 and generalised IoU losses of matched queries, divided by `count` boxes.

    logits [B, Q, classes], boxes [B, Q, 4] cxcywh. Queries without a match are background.
    """
    image = torch.cat([torch.full_like(queries, b) for b, (queries, _) in enumerate(matches)])
    query = torch.cat([queries for queries, _ in matches])
    labels = torch.cat([t["labels"][wanted] for t, (_, wanted) in zip(targets, matches, strict=True)])
    wanted = torch.cat([t["boxes"][wanted] for t, (_, wanted) in zip(targets, matches, strict=True)])
    truth = torch.zeros_like(logits)
    truth[image, query, labels] = 1.0
    result = boxes[image, query]
    overlap = _paired_giou(corners(result), corners(wanted))
    losses = {
        "class": sigmoid_focal_loss(logits, truth, alpha=ALPHA, gamma=GAMMA, reduction="sum"),
        "box": functional.l1_loss(result, wanted, reduction="sum"),
        "giou": (1 - overlap).sum(),
    }
    return {name: WEIGHTS[name] * value / count for name, value in losses.items()}


def _paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU [m] of boxes a and b [m, 4] xyxy, pair by pair."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    both = (high - low).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    return both / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


@dataclass(frozen=True)
class Noised:
    """Noised copies of the targets, put before the matching queries while training.

    labels [B, P] (-1 where a slot is empty), boxes [B, P, 4] cxcywh, with P = groups * 2 * slots: each group holds
    `slots` positive copies and then `slots` negative ones.
    """

    labels: Tensor
    boxes: Tensor
    groups: int
    slots: int

    def blocked(self, queries: int) -> Tensor:
        """[P + Q, P + Q] bool, True where attention is forbidden: nobody sees the copies of another group."""
        copies = self.labels.shape[1]
        group = torch.arange(copies + queries, device=self.labels.device) // (2 * self.slots)
        group[copies:] = self.groups
        blocked = group[:, None] != group[None, :]
        blocked[:, copies:] = False
        return blocked

    def matches(self, targets: Sequence[Target]) -> Matches:
        """The positive copies and the target each was made from."""
        results = []
        for target in targets:
            wanted = torch.arange(len(target["labels"]), device=self.labels.device).repeat(self.groups, 1)
            start = torch.arange(self.groups, device=wanted.device).unsqueeze(1) * 2 * self.slots
            results.append(((wanted + start).flatten(), wanted.flatten()))
        return results


def noised(
    targets: Sequence[Target],
    classes: int,
    *,
    number: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
    generator: torch.Generator | None = None,
) -> Noised | None:
    """Contrastive denoising copies (DINO, section 3.3), or None where there is no box to copy.

    `number` positive copies in all, but at least one group. Half of `label_noise` of the labels are drawn anew. The
    corners of positive copies move by less than half of the box's size times `box_noise`, those of negative ones by
    once to twice that.
    """
    slots = max((len(t["labels"]) for t in targets), default=0)
    if number <= 0 or slots == 0:
        return None
    groups = max(1, number // slots)
    device = targets[0]["boxes"].device

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device if generator else device).to(device)

    padded = [functional.pad(t["labels"], (0, slots - len(t["labels"])), value=-1) for t in targets]
    labels = torch.stack(padded).view(-1, 1, 1, slots).expand(-1, groups, 2, -1)  # [B, G, 2, M]
    boxes = torch.stack([functional.pad(t["boxes"], (0, 0, 0, slots - len(t["boxes"]))) for t in targets])
    boxes = boxes.view(-1, 1, 1, slots, 4).expand(-1, groups, 2, -1, -1)

    drawn = (rand(*labels.shape) * classes).long().clamp(max=classes - 1)
    noisy = torch.where((rand(*labels.shape) < label_noise / 2) & (labels >= 0), drawn, labels)
    negative = torch.tensor([0.0, 1.0], device=device).view(1, 1, 2, 1, 1)
    sign = (rand(*boxes.shape) < 0.5) * 2.0 - 1.0
    half = (boxes[..., 2:] / 2).repeat(1, 1, 1, 1, 2)
    moved = corners(boxes) + sign * (rand(*boxes.shape) + negative) * half * box_noise
    moved = centres(moved.clamp(0, 1))
    return Noised(noisy.flatten(1), moved.flatten(1, 3), groups, slots)
