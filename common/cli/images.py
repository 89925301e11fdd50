"""A token pruner on an image that a classifier reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from prunelab.common import testbeds
from prunelab.common.apply import apply, supports
from prunelab.common.cli.app import console
from prunelab.common.cli.apply import deliver
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.data import images
from prunelab.common.drawing import sheets
from prunelab.common.drawing.sheets import WHOLE, Panel
from prunelab.common.models import loading

SIDE = 160.0  # of a panel of the picture
CLASSIFIERS = ("digits_vit", "digits_vim")  # testbeds that tell what is in an image
OF_ASSETS = "vit_tiny_in1k"


def candidates(config: Mapping[str, Any]) -> Iterator[str]:
    """Models that may read an image: those that know photos first, our toys last."""
    if config["assets"] and (Path(config["assets"]) / OF_ASSETS / "model.safetensors").exists():
        yield OF_ASSETS
    yield from loading.cached(config)
    yield from CLASSIFIERS


def reader(method: Method, kinds: Sequence[str]) -> str:
    """The first testbed among `kinds` that the method can prune: it stands for its kind of model. Raises PrunelabError
    with every reason where none can be, without the lists of what would do."""
    reasons: dict[str, list[str]] = {}
    for name in kinds:
        why = supports(method, testbeds.get(name)().build())  # type: ignore[call-arg]
        if why:
            return name
        reasons.setdefault(str(why).partition("; ")[0], []).append(name)
    refusals = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
    raise PrunelabError(
        f"no model at hand can be pruned by {method.name} ({refusals}); name another with --model, or use the method in"
        f" code, see methods/{registry.slug(method)}/README.md"
    )


def chosen(method: Method, name: str, weights: Path | None, config: Mapping[str, Any]) -> tuple[str, nn.Module, Any]:
    """The model to read an image with, and its transform: the one named, else the first candidate that the method can
    prune. Raises PrunelabError with the reason of the last one where none can be."""
    if name:
        return (name, *loading.named(name, weights, config))
    why: object = ""
    for candidate in candidates(config):
        model, transform = loading.named(candidate, None, config)
        why = supports(method, model)
        if why:
            return candidate, model, transform
    raise PrunelabError(f"{why}; name a model with --model")


def run(
    method: Method,
    file: Path,
    budget: Budget,
    out: Path,
    name: str,
    weights: Path | None,
    config: Mapping[str, Any],
) -> None:
    """Print what the model sees with and without pruning, and draw the patches that are left."""
    name, model, transform = chosen(method, name, weights, config)
    x = images.read(file, lambda image: transform(ImageOps.exif_transpose(image))).unsqueeze(0)
    with torch.inference_mode():
        dense = model(x)
        if not torch.is_tensor(dense) or dense.dim() != 2:
            raise PrunelabError(f"{name} does not classify images; use --model digits_vit or a timm model")
        with apply(method, model, budget) as handle:
            pruned = model(x).softmax(-1)
            report, kept, info = handle.report(), handle.kept(), handle.adapter.info
    dense = dense.softmax(-1)
    before, after = int(dense.argmax()), int(pruned.argmax())
    lines = [
        f"{name}: {_label(model, before)} ({100 * float(dense.max()):.1f} %) without pruning",
        f"{method.name} at {budget}: {_label(model, after)} ({100 * float(pruned[0, after]):.1f} %)",
    ]
    if toy := name in testbeds.testbeds():
        lines.append(f"{name} is a toy of ours: of photos it knows nothing")
    for line in lines:
        console.print(line, markup=False)
    if toy:
        console.print("a timm checkpoint in the hub's cache, or one named by --model, knows photos")
    console.print(str(report))
    if not kept or info.grid is None:
        console.print("tokens were merged, so there is no picture of tokens kept")
        return
    grid = (int(info.grid[0]), int(info.grid[1]))
    image = sheets.photo(_shown(x[0]))
    bands = [("unpruned", [Panel(image)])]
    for site, indices in kept:
        left = set(info.patches(indices[0]).tolist())
        shares = bytes(WHOLE * (i in left) for i in range(grid[0] * grid[1]))
        bands.append((f"layer {site.layer}: {len(left)} of {len(shares)}", [Panel(image, "", grid, shares)]))
    title = f"What {method.name} leaves of {file.name}"
    drawn = sheets.sheet(bands, title, side=SIDE, ratio=x.shape[-1] / x.shape[-2], lines=lines, least=2 * SIDE)
    console.print(deliver(out, sheets.standalone(drawn), "picture"), soft_wrap=True)


def _label(model: nn.Module, number: int) -> str:
    """A class in words, where the model is of ImageNet's classes."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model) if hasattr(model, "pretrained_cfg") else None
    return f"class {number}" if subset is None else ImageNetInfo(subset).index_to_description(number)


def _shown(x: Tensor) -> Image.Image:
    """The image [C, H, W] as the model reads it, stretched to the full range."""
    low, high = x.min(), x.max()
    pixels = ((x - low) / (high - low).clamp_min(1e-6) * 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
