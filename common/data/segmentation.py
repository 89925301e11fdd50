"""Images with a class for every pixel, at every scale.

The testbed's scenes hold up to four handwritten digits of several sizes on a noisy ground. Every pixel of a digit's
stroke, thickened by one, has the digit as its class, every other pixel is background. Scenes differ in how many digits
they hold and in difficulty: in easy ones digits have full contrast on an empty ground, in hard ones they are pale and
lie between fragments of others. So tokens differ in how early a network can be sure of them, within a scene and between
scenes, which is what early exit lives on. Strokes of test scenes have not been seen in training
(`prunelab.common.data.digits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits
from prunelab.common.data.digits import Split
from prunelab.common.data.images import rgb

SIDE, CELL = 40, 4  # pixels of a scene, and of a patch
TILE = SIDE // 2  # a digit lies within a quarter of the scene
SIZES = (11.0, 17.0)  # pixels of a digit
BACKGROUND, CLASSES = 10, 11
INK = 0.3  # of full ink, from which on a pixel is a stroke
FRAGMENTS = 24  # of other digits, in the hardest scenes
CONTRAST = (0.2, 0.5)  # of a fragment, relative to full ink
PALEST = 0.4  # contrast of a digit in the hardest scenes
IGNORED = 255  # pixels without a label, in the files and here
SEED = 1000  # of the testbed's evaluation scenes

NORMS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # mean and deviation of colours in 0..255
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5,) * 3, (127.5,) * 3),
}


# -- scenes ----------------------------------------------------------------------------------------------------------


def scenes(
    split: Split, count: int, seed: int | torch.Generator, hardest: float = 1.0, deformed: bool = False
) -> tuple[Tensor, Tensor]:
    """Scenes [count, 1, 40, 40] float32, normalised, and labels [count, 40, 40] int64; the same for the same arguments.

    seed: a number, or a generator to go on drawing from. hardest: upper end of the scenes' difficulty. deformed: also
    `deform` the digits, to train on more shapes than there are images.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    images, kinds = digits.digits(split)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def pick(*shape: int) -> Tensor:
        return torch.randint(len(images), shape, generator=generator)

    difficulty = hardest * draw(count, 1)
    chosen = pick(count, 4)
    strokes = images[chosen].flatten(0, 1)
    if deformed:
        strokes = digits.deform(strokes, generator)
    there = (draw(count, 4) < 0.3 + 0.6 * draw(count, 1)).flatten()
    size = SIZES[0] + (SIZES[1] - SIZES[0]) * draw(4 * count)
    tiles = _place(strokes, size, draw(4 * count, 2)) * there[:, None, None]
    inked = F.max_pool2d(tiles.unsqueeze(1), 3, 1, 1).squeeze(1) > INK
    labels = _assemble(torch.where(inked, kinds[chosen].flatten()[:, None, None], BACKGROUND))
    contrast = 1 - (1 - PALEST) * difficulty * draw(count, 4)
    scene = _assemble(tiles * contrast.flatten()[:, None, None])

    low, high = CONTRAST
    shown = torch.arange(FRAGMENTS) < FRAGMENTS * difficulty  # harder scenes have more
    strength = (low + (high - low) * draw(count, FRAGMENTS)) * shown
    clutter = _fragments(images[pick(count, FRAGMENTS)], strength, draw(count, (SIDE // CELL) ** 2))
    scene = torch.where(labels == BACKGROUND, torch.maximum(scene, clutter), scene)
    scene = scene.unsqueeze(1) + digits.NOISE * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    return (scene - digits.SHIFT) / digits.SCALE, labels


def _place(strokes: Tensor, size: Tensor, at: Tensor) -> Tensor:
    """Digits [n, 8, 8] drawn `size` [n] pixels large into tiles [n, 20, 20], at [n, 2] in (0, 1) across their room."""
    factor = TILE / size
    room = 1 - size / TILE  # half widths that the digit can move to either side
    shift = (2 * at - 1) * room[:, None] * factor[:, None]
    zero = torch.zeros_like(factor)
    rows = [torch.stack([factor, zero, -shift[:, 0]], -1), torch.stack([zero, factor, -shift[:, 1]], -1)]
    where = F.affine_grid(torch.stack(rows, 1), [len(size), 1, TILE, TILE], align_corners=False)
    return F.grid_sample(strokes.unsqueeze(1), where, align_corners=False).squeeze(1)


def _assemble(tiles: Tensor) -> Tensor:
    """Tiles [4 n, 20, 20], row by row -> [n, 40, 40]."""
    return tiles.view(-1, 2, 2, TILE, TILE).transpose(2, 3).reshape(-1, SIDE, SIDE)


def _fragments(images: Tensor, contrast: Tensor, places: Tensor) -> Tensor:
    """Quarters of digits [n, F, 8, 8], drawn with contrast [n, F] into the cells that places [n, cells] rank first:
    [n, 40, 40]."""
    count, side = len(images), SIDE // CELL
    drawn = images[..., :CELL, :CELL] * contrast[..., None, None]
    cells = places.argsort(1)[:, : images.shape[1], None, None].expand_as(drawn)
    scene = torch.zeros(count, side * side, CELL, CELL).scatter(1, cells, drawn)
    return scene.view(count, side, side, CELL, CELL).transpose(2, 3).reshape(count, SIDE, SIDE)


# -- data sets on disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its evaluation images and label maps below its root, as mmsegmentation lays it out.

    listing: a text file with one name a line; without one, every image of the folder. In the label maps 0 means no
    label, and classes count from 1.
    """

    images: str
    labels: str
    suffix: str = ".png"
    listing: str | None = None


LAYOUTS: Mapping[str, Layout] = {
    "ade20k": Layout("images/validation", "annotations/validation"),
    "pascal_context": Layout("JPEGImages", "SegmentationClassContext", listing="ImageSets/SegmentationContext/val.txt"),
    "coco_stuff10k": Layout("images/test2014", "annotations/test2014", "_labelTrainIds.png"),
}


def files(root: Path, layout: Layout) -> list[tuple[Path, Path]]:
    """Pairs of image and label map, in order of their names; an error names the first that is missing."""
    folder = root / layout.images
    if layout.listing is not None:
        listing = root / layout.listing
        if not listing.exists():
            raise PrunelabError(f"{listing} is missing; give the root of the data set, laid out as mmsegmentation does")
        names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    else:
        names = sorted(path.stem for path in folder.glob("*.jpg"))
    if not names:
        raise PrunelabError(f"there are no images in {folder}; give the root of the data set")
    pairs = [(folder / f"{name}.jpg", root / layout.labels / f"{name}{layout.suffix}") for name in names]
    for path in (path for pair in pairs for path in pair):
        if not path.exists():
            raise PrunelabError(f"{path} is missing; restore it, or prepare the data set as mmsegmentation does")
    return pairs


def read(image: Path, labels: Path, bound: tuple[int, int], norm: str) -> tuple[Tensor, Tensor]:
    """An image [1, 3, H, W], as large as fits a long and a short side of `bound` pixels, and its labels [1, H', W'] at
    the original size, from 0 on, `IGNORED` where there is none."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in NORMS[norm])
    with _open(image) as picture:
        colours = rgb(picture)
        factor = min(max(bound) / max(colours.size), min(bound) / min(colours.size))
        wide, high = (max(1, int(side * factor + 0.5)) for side in colours.size)
        pixels = torch.from_numpy(np.array(colours.resize((wide, high), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    with _open(labels) as picture:
        marks = torch.from_numpy(np.array(picture)).long()
    if marks.dim() != 2:
        raise PrunelabError(f"{labels} is not a label map; it needs one channel of class numbers")
    marks = torch.where((marks == 0) | (marks == IGNORED), IGNORED, marks - 1)
    return ((pixels - mean) / deviation).unsqueeze(0), marks.unsqueeze(0)


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError):
        raise PrunelabError(f"the image {path} cannot be decoded; restore it") from None


def batches(
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    samples: int | None,
    batch: int,
    bound: tuple[int, int] = (2048, 512),
    norm: str = "imagenet",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [B, 3, H, W], labels [B, H', W']) of the first `samples` images of a catalogue entry.

    They come in order, all of them where `samples` is None. Images of a data set on disk come one by one, since they
    differ in size; `bound` and `norm` are the model's, see `read`.
    """
    if identity["loader"] == "digit_maps":
        assert samples is not None, "scenes have no end; configs/datasets.yaml says how many"
        images, labels = scenes("test", samples, SEED)
        yield from zip(images.split(batch), labels.split(batch), strict=True)
        return
    for image, marks in files(Path(config[identity["setting"]]), LAYOUTS[identity["loader"]])[:samples]:
        yield read(image, marks, bound, norm)


# -- scores ----------------------------------------------------------------------------------------------------------


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixels [C, C] int64 by true class (row) and predicted class (column); pixels labelled `IGNORED` do not count."""
    counted = labels != IGNORED
    if bool((labels[counted] >= classes).any()):
        raise PrunelabError(f"the labels go up to {int(labels[counted].max())}, but the model knows {classes} classes")
    return torch.bincount(labels[counted] * classes + predicted[counted], minlength=classes**2).view(classes, classes)


def iou(table: Tensor) -> Tensor:
    """Intersection over union [C] of every class, NaN for one that is neither labelled nor predicted."""
    shared = table.diag()
    return shared / (table.sum(0) + table.sum(1) - shared)
