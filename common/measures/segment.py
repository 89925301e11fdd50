"""Segmentation quality of a network, pruned or not, with the MACs it really used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.backbones.segvit import Segmenter, sliding
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.data import digits, segmentation
from prunelab.common.measures.bench import Bench, finite
from prunelab.common.models import devices, loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.adapters.passes import Trace
from prunelab.common.tokens.apply import Handle
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.segment import Segment


BATCH = 50
CALIBRATION = 32  # images that methods with input-dependent counts are matched on


def measure(bench: Bench[Segment.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.segment`."""
    device, settings = bench.device, bench.settings
    model, _ = loading.load(bench.ids["model"], bench.config)
    if not isinstance(model, Segmenter):
        raise PrunelabError(f"{type(model).__name__} makes no maps; name a segmenter of configs/models.yaml")
    model = devices.place(model, device)
    model.presence = settings.presence
    windows = dict(bench.ids["model"].get("windows", {}))
    stride = windows.pop("stride", None)

    def data(samples: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        return segmentation.batches(bench.ids["data"], bench.config, samples, BATCH, **windows)

    out: dict[str, Any] = {}
    method, budget = bench.method(TokenPruner), bench.budget
    if method is not None:
        if budget.unit in ("cost", "macs"):
            budget = match.match(method, model, budget, _windows(data(CALIBRATION), model).to(device))
        out["budget"] = {"text": str(budget)}
    table = torch.zeros(model.classes, model.classes, dtype=torch.long)
    with bench.at_work(method, model, budget=budget) as handle, torch.inference_mode():
        with counted(model, handle) as counts:
            for images, labels in track(data(settings.samples), "segmenting", transient=True):
                predicted = predict(model, images.to(device), labels, stride)
                table += segmentation.confusion(predicted, labels, model.classes)
        if handle is not None and settings.gallery:
            out["scenes"] = gallery(model, handle, next(data(settings.gallery)))
    dense = meter.macs(model, adapter_for(model).example())
    used, scoring = torch.tensor([dense], dtype=torch.float64), torch.zeros(1)
    if handle is not None:
        kept = torch.cat(counts)
        used, scoring = window_macs(handle, kept)
        share = kept.double().mean(0) / handle.adapter.info.tokens
        out["tokens"] = {"value": round(float(share[-1]), 4), "sites": [round(float(s), 4) for s in share]}
    out |= quality(table)
    out["gmacs"] = {"value": round(float(used.mean()) / 1e9, 6), "n": len(used)}
    out["scoring_gmacs"] = {"value": round(float(scoring.mean()) / 1e9, 6)}
    out["saving"] = {"value": round(100 * (1 - float(used.mean()) / dense), 3)}
    return out


@contextmanager
def counted(model: Segmenter, handle: Handle | None) -> Iterator[list[Tensor]]:
    """Collects, while it is open, how many tokens [B, sites] went on from each site in every forward pass."""
    counts: list[Tensor] = []

    def note(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        if handle is not None:
            counts.append(torch.stack([(places >= 0).sum(1) for _, places in handle.kept()], 1).cpu())

    hook = model.register_forward_hook(note)
    try:
        yield counts
    finally:
        hook.remove()


def predict(model: Segmenter, images: Tensor, labels: Tensor, stride: int | None = None) -> Tensor:
    """Classes [B, H', W'] at the size of the labels [B, H', W'] of images [B, 3, H, W], by windows."""
    scores = finite(sliding(model, images, stride), "its weights and the images")
    if scores.shape[-2:] != labels.shape[-2:]:
        scores = F.interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=False)
    return scores.argmax(1).cpu()


def quality(table: Tensor) -> dict[str, Any]:
    """`miou` and `accuracy` in percent from a confusion table [C, C]."""
    pixels = int(table.sum())
    if not pixels:
        raise PrunelabError("no pixel has a label; check the label maps of the data set")
    each = segmentation.iou(table)
    return {
        "miou": {"value": round(100 * float(each.nanmean()), 4), "classes": int(each.isfinite().sum())},
        "accuracy": {"value": round(100 * float(table.diag().sum()) / pixels, 4), "pixels": pixels},
    }


def window_macs(handle: Handle, counts: Tensor) -> tuple[Tensor, Tensor]:
    """MACs [n] of each window, and of scoring alone, given the tokens [n, sites] that went on from each site.

    Where counts do not depend on the input, all windows cost what the report says. Elsewhere exact too: what lies
    between two sites costs a quadratic in the tokens there (attention is quadratic, all else linear), so three counts a
    site decide it; the stretches between sites add up.
    """
    if not handle.application.method.adaptive:
        report = handle.report()
        total, scoring = (
            torch.full((len(counts),), x, dtype=torch.float64) for x in (report.macs, report.scoring_macs)
        )
        return total, scoring
    sites, tokens = handle.application.sites, handle.adapter.info.tokens
    points = sorted({1, (tokens + 1) // 2, tokens})

    def at(site: int, count: int) -> tuple[float, float]:  # all tokens before the site, `count` behind it, then one
        return _macs(handle, [tokens if i < site else count if i == site else 1 for i in range(len(sites))])

    total, scoring = (torch.full((len(counts),), value, dtype=torch.float64) for value in at(0, 1))
    for site in range(len(sites)):
        costs = torch.tensor([at(site, point) for point in points], dtype=torch.float64)
        weights = _lagrange(points, counts[:, site].double())
        more = weights @ (costs - costs[0])
        total, scoring = total + more[:, 0], scoring + more[:, 1]
    return total, scoring


def _lagrange(points: list[int], at: Tensor) -> Tensor:
    """Weights [n, P] that make a polynomial's values at the points into its values at [n]."""
    columns = []
    for i, own in enumerate(points):
        factors = [(at - other) / (own - other) for j, other in enumerate(points) if j != i]
        columns.append(torch.stack(factors).prod(0) if factors else torch.ones_like(at))
    return torch.stack(columns, 1)


def _macs(handle: Handle, counts: list[int]) -> tuple[float, float]:
    """MACs of one window with so many tokens behind each site, and of scoring alone."""
    adapter, application = handle.adapter, handle.application
    depth = adapter.info.depth
    layers = [float(adapter.info.tokens)] * depth
    for site, count in zip(application.sites, counts, strict=True):
        layers[site.layer + 1 :] = [float(count)] * (depth - site.layer - 1)
    seen = Trace(depth, measured=Trace.of(layers))
    remove = adapter.install(replace(application, trace=seen))
    try:
        total = meter.flops(lambda: meter.on_meta(adapter.model, adapter.example()), seen) / 2
    finally:
        remove()
    return total, seen.scoring_flops / 2


def gallery(model: Segmenter, handle: Handle, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """How many scenes, the `grid` of tokens, and in `items` for each scene its classes, the share of pixels that is
    right in percent, the image (a row of hexadecimal bytes a line, 255 is full ink), and the tokens that went on from
    each site. For the testbed's scenes alone: most data sets forbid passing their images on."""
    images, labels = data
    if images.shape[1] != 1:
        raise PrunelabError("a gallery shows the testbed's scenes alone; set `scales: [testbed]` in paper.yaml")
    right = (model(images).argmax(1) == labels).float().mean((1, 2)) * 100
    ink = ((images[:, 0] * digits.SCALE + digits.SHIFT).clamp(0, 1) * 255).round().int()
    items = [
        {
            "classes": sorted(set(labels[i].unique().tolist()) - {segmentation.BACKGROUND}),
            "right": round(float(right[i]), 1),
            "image": [bytes(row).hex() for row in ink[i].tolist()],
            "sites": [
                {"layer": site.layer, "kept": sorted(places[i][places[i] >= 0].tolist())}
                for site, places in handle.kept()
            ],
        }
        for i in range(len(images))
    ]
    return {"value": len(items), "grid": list(model.patch_embed.grid_size), "items": items}


def _windows(data: Iterator[tuple[Tensor, Tensor]], model: Segmenter) -> Tensor:
    """One window [n, 3, H, W] of every image of a data set: the upper left one."""
    high, wide = model.window
    return torch.cat(
        [F.pad(x, (0, max(wide - x.shape[-1], 0), 0, max(high - x.shape[-2], 0)))[..., :high, :wide] for x, _ in data]
    )
