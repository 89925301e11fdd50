"""COCO's average precision of boxes, counted by faster-coco-eval, and how far it would move on other images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data.detection import Objects
from prunelab.common.metrics import uncertainty

MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MOST = 300  # boxes of an image that are handed in, or as many as there are queries; DINO and its kin do so
GROUPS = 50  # of images at most, each left out once


@dataclass(frozen=True)
class Detections:
    """Boxes [k, 4] xyxy in an image's own pixels, scores [k], and labels [k] int64 as in `Objects`."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def detections(output: Mapping[str, Tensor], objects: Sequence[Objects], classes: Sequence[int]) -> list[Detections]:
    """The best boxes of each image of a batch, in its own pixels.

    output: a detector's `logits` [B, Q, C], whose sigmoid is the score, and `boxes` [B, Q, 4] cxcywh as shares of each
    image's valid part. A query may give boxes of several classes. objects: for the images' sizes. classes: ids of the
    data set's classes; the detector has one output for each of them, or one for every number up to the highest id.
    """
    logits, boxes = output["logits"].float(), output["boxes"].float()
    if len(classes) < logits.shape[2] > max(classes):
        logits = logits[..., list(classes)]
    if logits.shape[2] != len(classes):
        raise PrunelabError(f"the detector tells {logits.shape[2]} classes apart, the data set has {len(classes)}")
    if not bool(torch.isfinite(logits).all() and torch.isfinite(boxes).all()):
        raise PrunelabError("the detector's output holds NaN or infinite values; check its weights and the images")
    kinds = logits.shape[2]
    scores, best = logits.sigmoid().flatten(1).topk(min(MOST, logits.shape[1]), dim=1)
    size = torch.tensor([[o.width, o.height] * 2 for o in objects], device=boxes.device)
    pixels = box_convert(boxes, "cxcywh", "xyxy") * size.unsqueeze(1)
    chosen = pixels.gather(1, (best // kinds).unsqueeze(-1).expand(-1, -1, 4))
    return [Detections(*row) for row in zip(chosen.cpu(), scores.cpu(), (best % kinds).cpu(), strict=True)]


def average_precision(truth: Sequence[Objects], results: Sequence[Detections]) -> dict[str, float]:
    """AP, AP50, AP75 and AP of small, medium and large objects in percent, as pycocotools gives them; NaN where no
    object of that size is annotated. truth and found: one entry an image, in the same order."""
    return _measure(_evaluator(truth, results), range(1, len(truth) + 1))


def with_uncertainty(truth: Sequence[Objects], results: Sequence[Detections]) -> dict[str, dict[str, Any]]:
    """`average_precision` as metrics with standard errors; measures that are NaN are left out.

    AP is no mean over images, so its error comes from the jackknife: up to 50 groups of images are left out in turn.
    `samples` are the pseudo-values, shifted so that their mean is the AP: two runs on the same images can be compared
    pair by pair, as with any other metric.
    """
    evaluator, images = _evaluator(truth, results), range(1, len(truth) + 1)
    whole, size = _measure(evaluator, images), math.ceil(len(truth) / GROUPS)
    groups = math.ceil(len(truth) / size)  # as equal in size as can be
    left = [_measure(evaluator, [i for i in images if i % groups != g]) for g in range(groups)] if groups > 1 else []
    out: dict[str, dict[str, Any]] = {}
    for name, value in whole.items():
        if math.isnan(value):
            continue
        out[name] = {"value": round(value, 4), "n": len(truth)}
        others = [part[name] for part in left]
        if others and not any(map(math.isnan, others)):
            centre = sum(others) / groups
            out[name] = uncertainty.mean([value + (groups - 1) * (centre - other) for other in others]) | out[name]
    return out


def _evaluator(truth: Sequence[Objects], results: Sequence[Detections]) -> Any:
    """Both sides in faster-coco-eval's structures; images are numbered from 1."""
    from faster_coco_eval import COCO, COCOeval_faster

    if len(truth) != len(results):
        raise PrunelabError(
            f"{len(truth)} images are annotated but {len(results)} have detections; give one entry each"
        )
    if not any(bool((~o.crowd).any()) for o in truth):
        raise PrunelabError("AP needs at least one annotated object; none of the images has one")
    images = [{"id": i, "height": o.height, "width": o.width} for i, o in enumerate(truth, 1)]
    kinds = {int(k) for side in (truth, results) for entry in side for k in entry.labels.unique()}
    categories = [{"id": k, "name": str(k)} for k in sorted(kinds)]
    sides = []
    for rows in (
        [_rows(i, o.boxes, o.labels, area=o.area, iscrowd=o.crowd.int()) for i, o in enumerate(truth, 1)],
        [_rows(i, d.boxes, d.labels, score=d.scores) for i, d in enumerate(results, 1)],
    ):
        annotations = [{"id": i, **row} for i, row in enumerate((row for part in rows for row in part), 1)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        sides.append(COCO(content, print_function=_silent))
    return COCOeval_faster(*sides, "bbox", print_function=_silent)


def _rows(image: int, boxes: Tensor, labels: Tensor, **values: Tensor) -> list[dict[str, Any]]:
    """One annotation a box, as COCO writes it."""
    corner = box_convert(boxes.double(), "xyxy", "xywh")
    columns = {"area": corner[:, 2:].prod(1), **values}
    rest = [dict(zip(columns, row, strict=True)) for row in zip(*(v.tolist() for v in columns.values()), strict=True)]
    return [
        {"image_id": image, "bbox": box, "category_id": label, **row}
        for box, label, row in zip(corner.tolist(), labels.tolist(), rest, strict=True)
    ]


def _measure(evaluator: Any, images: Sequence[int]) -> dict[str, float]:
    """The six measures over some of the evaluator's images, in percent."""
    evaluator.params.imgIds = list(images)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    values = [float(v) for v in evaluator.stats[: len(MEASURES)]]
    return {name: 100 * v if v >= 0 else math.nan for name, v in zip(MEASURES, values, strict=True)}


def _silent(*_: object) -> None:
    """faster-coco-eval reports its progress; nobody needs it here."""
