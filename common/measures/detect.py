"""Average precision of a detector, pruned or not, with the MACs its encoder and the whole of it used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.data import detection, digits
from prunelab.common.data.detection import Objects
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics.average_precision import Detections, detections, with_uncertainty
from prunelab.common.models import devices, loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import Handle
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.detect import Detect


BATCH = 10  # scenes at a time, all of one size
CALIBRATION = 10  # images that methods with input-dependent counts are matched on
SHOWN = 0.3  # score from which a picture shows a box


def measure(bench: Bench[Detect.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.detect`."""
    device, settings, shown = bench.device, bench.settings, bench.settings.shown
    scenes = bench.ids["data"]["loader"] == "digit_detection"
    batch = settings.batch or (BATCH if scenes else 1)
    if shown and not scenes:
        raise PrunelabError("pictures show the testbed's scenes alone; set `scales: [testbed]` in paper.yaml")
    model = devices.place(loading.load(bench.ids["model"], bench.config)[0], device)
    data = detection.load(bench.ids["data"], bench.config, settings.samples)  # no limit: the whole set

    out: dict[str, Any] = {}
    method, budget = bench.method(TokenPruner), None
    if method is not None:
        calibration = next(data.batches(CALIBRATION))[0].to(device) if method.adaptive else None
        budget = match.match(method, model, bench.budget, calibration)
        out["budget"] = {"text": str(budget)}
    truth: list[Objects] = []
    results: list[Detections] = []
    items: list[dict[str, Any]] = []
    with bench.at_work(method, model, budget=budget) as handle, torch.inference_mode():
        total = -(-len(data.objects) // batch)
        for x, mask, objects in track(data.batches(batch), "detecting", total=total, transient=True):
            output = detected(model, x.to(device), None if mask is None else mask.to(device))
            boxes = detections(output, objects, data.classes)
            if len(truth) < shown:
                items += _items(x, objects, boxes, handle)
            truth += objects
            results += boxes
        report = None if handle is None else handle.report()
    dense, inside = _dense(model)
    used, scoring = (dense, 0.0) if report is None else (report.macs, report.scoring_macs)
    out |= {name.lower(): metric for name, metric in with_uncertainty(truth, results).items()}
    for name, value in {"gmacs": used, "encoder_gmacs": inside - (dense - used), "scoring_gmacs": scoring}.items():
        out[name] = {"value": round(value / 1e9, 6)}
    out["saving"] = {"value": round(100 * (1 - used / dense), 3)}
    out["encoder_saving"] = {"value": round(100 * (dense - used) / inside, 3)}
    if shown:
        out["scenes"] = {"value": shown, "items": items[:shown]}
    return out


def detected(model: nn.Module, x: Tensor, mask: Tensor | None) -> Mapping[str, Tensor]:
    """What a detector says of images [B, C, H, W] whose padding `mask` [B, H, W] marks: `logits` [B, Q, C] and `boxes`
    [B, Q, 4]. Those of transformers want the image marked instead, and give the boxes another name."""
    if not hasattr(model, "config"):
        output: Mapping[str, Tensor] = model(x, mask)
        return output
    outputs = model(x, pixel_mask=None if mask is None else (~mask).long())
    return {"logits": outputs.logits, "boxes": outputs.pred_boxes}


def _dense(model: nn.Module) -> tuple[float, float]:
    """MACs of the unpruned model at its standard size, and of the layers among them that tokens can be pruned in."""
    adapter = adapter_for(model)
    layers = {id(block) for block in adapter.blocks}  # type: ignore[attr-defined]
    names = [f"{type(model).__name__}.{name}" for name, module in model.named_modules() if id(module) in layers]
    with FlopCounterMode(display=False) as counter:
        meter.on_meta(model, adapter.example())
    counts = counter.get_flop_counts()
    return counter.get_total_flops() / 2, sum(sum(counts[name].values()) for name in names) / 2


def _items(x: Tensor, objects: list[Objects], boxes: list[Detections], handle: Handle | None) -> list[dict[str, Any]]:
    """For each image of a batch: the image (a row of hexadecimal bytes a line, 255 is full ink); the boxes annotated
    and found, each [label, score, x0, y0, x1, y1]; the `grids` of the encoder's levels; and for every site the places
    of the tokens kept, level by level, finest first."""
    ink = ((x[:, 0] * digits.SCALE + digits.SHIFT).clamp(0, 1) * 255).round().int().tolist()
    kept, grids = ([], []) if handle is None else (handle.kept(), [list(g) for g in handle.adapter.grids()])  # type: ignore[attr-defined]

    def written(entry: Detections) -> list[list[float]]:
        rows = zip(entry.labels.tolist(), entry.scores.tolist(), entry.boxes.tolist(), strict=True)
        return [
            [label, round(score, 3), *(round(side, 1) for side in box)] for label, score, box in rows if score >= SHOWN
        ]

    return [
        {
            "image": [bytes(row).hex() for row in ink[i]],
            "annotated": written(Detections(o.boxes, torch.ones(len(o.labels)), o.labels)),
            "found": written(boxes[i]),
            "grids": grids,
            "sites": [{"layer": s.layer, "kept": _levels(places[i], grids)} for s, places in kept],
        }
        for i, o in enumerate(objects)
    ]


def _levels(places: Tensor, grids: list[list[int]]) -> list[list[int]]:
    """Places in the flattened levels as places in each level's own grid; -1 marks padding."""
    levels, start = [], 0
    for height, width in grids:
        inside = places[(places >= start) & (places < start + height * width)] - start
        levels.append(sorted(inside.tolist()))
        start += height * width
    return levels
