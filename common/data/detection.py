"""Images with boxes: scenes of handwritten digits for the testbed, and folders in COCO's layout.

A scene is a canvas of 96 x 96 pixels. Up to six digits of scikit-learn's set, each of its own size and contrast, lie
on it without touching one another, among pieces of other digits and under noise; some scenes hold none. Digits cover
about an eighth of the canvas, so that most tokens of a detector are background, and the pieces make sure that contrast
alone does not tell which. Training and test scenes share no digit (`prunelab.common.data.digits`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert
from torchvision.transforms.functional import normalize, to_tensor

from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits, images

SEED = 1000  # of the testbed's evaluation scenes


@dataclass(frozen=True)
class Objects:
    """What is annotated in one image of `height` x `width` pixels.

    boxes [m, 4] float64 xyxy in pixels, as annotated; labels [m] int64, the place of each class in the data set's
    list; crowd [m] bool, True for regions where detections count neither for nor against; area [m] float64 in square
    pixels, which sorts objects into small, medium and large. m may be 0.
    """

    height: int
    width: int
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    area: Tensor

    def target(self) -> dict[str, Tensor]:
        """What a detector learns from: `labels` [m] and `boxes` [m, 4] float32 cxcywh as shares of the image, cut at
        its border, without crowds."""
        size = torch.tensor([self.width, self.height] * 2)
        shares = (self.boxes[~self.crowd] / size).clamp(0, 1)
        return {"labels": self.labels[~self.crowd], "boxes": box_convert(shares, "xyxy", "cxcywh").float()}


Batch = tuple[Tensor, Tensor | None, list[Objects]]  # images [B, C, H, W], mask [B, H, W] True where padded, objects


@dataclass(frozen=True)
class Collection:
    """Annotated images: `image(i)` reads the i-th as [C, h, w]; `classes` are the ids of the classes, ascending."""

    image: Callable[[int], Tensor]
    objects: Sequence[Objects]
    classes: tuple[int, ...]

    def batches(self, size: int) -> Iterator[Batch]:
        """The images in order, `size` at a time."""
        for start in range(0, len(self.objects), size):
            part = self.objects[start : start + size]
            images, mask = pad([self.image(start + i) for i in range(len(part))])
            yield images, mask, list(part)


def load(identity: Mapping[str, Any], config: Mapping[str, Any], samples: int | None) -> Collection:
    """The first `samples` images of a catalogue entry (None: all)."""
    if identity["loader"] == "digit_detection":
        assert samples is not None, "scenes have no end; configs/datasets.yaml says how many"
        x, objects = scenes("test", samples, SEED)
        return Collection(x.__getitem__, objects, tuple(range(10)))
    collection = coco(identity, config)
    return replace(collection, objects=collection.objects[:samples])


# -- testbed: digits in scenes ---------------------------------------------------------------------------------------

SIDE = 96  # pixels
MOST = 6  # digits in a scene; how many is drawn from 0 to MOST
SIZES = (14.0, 42.0)  # pixels a side of a digit's square, drawn evenly on a logarithmic scale
TRIALS = 20  # places tried for a digit; one that fits nowhere is left out
PIECES = 10  # quarters of other digits, at half the size of a digit
CONTRAST, FAINT = (0.6, 1.0), (0.3, 0.6)  # of digits and of pieces, relative to full ink
INK = 0.25  # a pixel belongs to a digit from this share of full ink on
CHUNK = 16  # scenes drawn at a time


def scenes(
    split: digits.Split, count: int, seed: int | torch.Generator, clutter: float = 1.0, deformed: bool = False
) -> tuple[Tensor, list[Objects]]:
    """Scenes [count, 1, 96, 96] float32, normalised as `digits.scenes`, and the digits in them; the same for the same
    arguments, and the first ones do not depend on how many follow.

    A box is the smallest that holds the digit's ink. clutter scales the contrast of the pieces (training may start
    without them). deformed: digits are also turned, scaled and sheared.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    canvas, objects = [], []
    for _ in range(0, count, CHUNK):
        x, result = _chunk(split, generator, clutter, deformed)
        canvas.append(x)
        objects += result
    scene = torch.cat(canvas)[:count] if canvas else torch.zeros(0, 1, SIDE, SIDE)
    return scene, objects[:count]


def _chunk(
    split: digits.Split, generator: torch.Generator, clutter: float, deformed: bool
) -> tuple[Tensor, list[Objects]]:
    """CHUNK scenes [CHUNK, 1, SIDE, SIDE] and their digits."""
    source, names = digits.digits(split)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(CHUNK, *shape, generator=generator)

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, (CHUNK, *shape), generator=generator)

    def sizes(slots: int) -> Tensor:
        return uniform(math.log(SIZES[0]), math.log(SIZES[1]), slots).exp()

    chosen, size = draw(len(source), MOST), sizes(MOST)
    shape = source[chosen].flatten(0, 1)
    shape = digits.deform(shape, generator) if deformed else shape
    blur = size / 16  # half a pixel of the 8 x 8 digit: its ink reaches so far over the square
    corner, fits = _places(uniform(0, 1, MOST, TRIALS, 2), size + 2 * blur)
    corner = corner + blur.unsqueeze(-1)
    fits &= torch.arange(MOST) < draw(MOST + 1, 1)
    ink = _paint(shape, corner.flatten(0, 1), size.flatten()).view(CHUNK, MOST, SIDE, SIDE)
    strokes = ink * uniform(*CONTRAST, MOST, 1, 1) * fits[..., None, None]

    quarters = source.unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2)  # [n, 4, 4, 4]
    pieces = quarters[draw(len(source), PIECES), draw(4, PIECES)].flatten(0, 1)
    small = sizes(PIECES) / 2
    where = uniform(0, 1, PIECES, 2) * (SIDE - small).unsqueeze(-1)
    faint = _paint(pieces, where.flatten(0, 1), small.flatten()).view(CHUNK, PIECES, SIDE, SIDE)
    faint = faint * clutter * uniform(*FAINT, PIECES, 1, 1)

    scene = torch.cat([strokes, faint], 1).amax(1, keepdim=True)
    scene = scene + digits.NOISE * torch.randn(scene.shape, generator=generator)
    boxes = _bounds(ink > INK)
    objects = [_digits(boxes[i, fits[i]], names[chosen[i, fits[i]]]) for i in range(CHUNK)]
    return (scene - digits.SHIFT) / digits.SCALE, objects


def _places(shares: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Upper left corners [B, S, 2] of squares of the given sizes [B, S] that do not touch, one after the other at the
    first free of T places, shares [B, S, T, 2] of the room there is; and whether there was a free one [B, S]."""
    corner, fits = torch.zeros(*size.shape, 2), torch.zeros(size.shape, dtype=torch.bool)
    for slot in range(size.shape[1]):
        side = size[:, slot, None, None]
        trial = shares[:, slot] * (SIDE - side)  # [B, T, 2]
        before, extent = corner[:, None, :slot], size[:, None, :slot, None]  # [B, 1, s, 2] and [B, 1, s, 1]
        low = torch.maximum(trial.unsqueeze(2), before)
        high = torch.minimum((trial + side).unsqueeze(2), before + extent)
        blocked = ((high > low).all(-1) & fits[:, None, :slot]).any(-1)  # [B, T]
        first = (~blocked).int().argmax(1)
        corner[:, slot] = trial[torch.arange(len(trial)), first]
        fits[:, slot] = ~blocked.all(1)
    return corner, fits


def _paint(shapes: Tensor, corner: Tensor, size: Tensor) -> Tensor:
    """Shapes [n, h, h] as squares of `size` [n] pixels at corners [n, 2] of empty canvases [n, SIDE, SIDE]."""
    zoom = SIDE / size
    shift = (SIDE - 2 * corner) / size.unsqueeze(-1) - 1
    zero = torch.zeros_like(zoom)
    rows = [torch.stack([zoom, zero, shift[:, 0]], -1), torch.stack([zero, zoom, shift[:, 1]], -1)]
    where = F.affine_grid(torch.stack(rows, 1), [len(shapes), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(shapes.unsqueeze(1), where, align_corners=False).squeeze(1)


def _bounds(ink: Tensor) -> Tensor:
    """The smallest boxes [..., 4] xyxy around the True pixels of ink [..., H, W]."""
    columns, rows = ink.any(-2).int(), ink.any(-1).int()
    first = [line.argmax(-1) for line in (columns, rows)]
    last = [line.shape[-1] - line.flip(-1).argmax(-1) for line in (columns, rows)]
    return torch.stack(first + last, -1)


def _digits(boxes: Tensor, labels: Tensor) -> Objects:
    boxes = boxes.double()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Objects(SIDE, SIDE, boxes, labels, torch.zeros(len(boxes), dtype=torch.bool), area)


# -- assets and paper: COCO ------------------------------------------------------------------------------------------

SHORTER, LONGER = 800, 1333  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def coco(identity: Mapping[str, Any], config: Mapping[str, Any]) -> Collection:
    """A folder with images and annotations in COCO's layout; the entry's `images` and `annotations` say where.

    Boxes that reach over the image's border stay as annotated, as AP is defined on them. Boxes of no size, wholly
    outside their image or not finite are refused with their annotation's id.
    """
    root = Path(config[identity["setting"]]) if "setting" in identity else Path(config["assets"]) / identity["folder"]
    path = root / identity["annotations"]
    try:
        data = json.loads(path.read_text(encoding="utf8"))
        return _collection(data, root / identity["images"])
    except OSError:
        raise PrunelabError(f"the annotations {path} are missing; point to a folder in COCO's layout") from None
    except (ValueError, KeyError, TypeError) as error:
        raise PrunelabError(f"{path} is not in COCO's layout ({type(error).__name__}: {error})") from None


def _collection(data: Mapping[str, Any], folder: Path) -> Collection:
    ids = tuple(sorted({int(category["id"]) for category in data["categories"]}))
    label = {category: i for i, category in enumerate(ids)}
    size = {entry["id"]: (int(entry["height"]), int(entry["width"])) for entry in data["images"]}
    if not size or len(size) < len(data["images"]):
        raise PrunelabError(
            f"the annotations of {folder} list no image, or one twice; give a file that lists each once"
        )
    results: dict[Any, list[tuple[list[float], int, bool, float]]] = {image: [] for image in size}
    for entry in data["annotations"]:
        name, image = f"annotation {entry['id']} of {folder}", entry["image_id"]
        if image not in size or entry["category_id"] not in label:
            raise PrunelabError(
                f"{name} names an image or a category that the file does not list; correct it or leave it out"
            )
        x, y, width, height = (float(value) for value in entry["bbox"])
        inside = x < size[image][1] and y < size[image][0] and x + width > 0 and y + height > 0
        if not (math.isfinite(x + y + width + height) and width > 0 and height > 0 and inside):
            raise PrunelabError(
                f"{name} has the box {entry['bbox']}, of which nothing is in the image; correct it or leave it out"
            )
        area = float(entry.get("area", width * height))
        box = [x, y, x + width, y + height]
        results[image].append((box, label[entry["category_id"]], bool(entry.get("iscrowd", 0)), area))
    paths = [files.inside(folder, entry["file_name"]) for entry in data["images"]]
    objects = [_objects(*size[image], results[image]) for image in size]
    return Collection(lambda i: _read(paths[i], objects[i]), objects, ids)


def _objects(height: int, width: int, rows: Sequence[tuple[list[float], int, bool, float]]) -> Objects:
    return Objects(
        height,
        width,
        torch.tensor([box for box, *_ in rows], dtype=torch.float64).view(-1, 4),
        torch.tensor([label for _, label, _, _ in rows], dtype=torch.int64),
        torch.tensor([crowd for _, _, crowd, _ in rows], dtype=torch.bool),
        torch.tensor([area for *_, area in rows], dtype=torch.float64),
    )


def _read(path: Path, objects: Objects) -> Tensor:
    """One image, transformed; its size must be the annotated one, or every box would be elsewhere."""

    def checked(image: Image.Image) -> Tensor:
        if image.size != (objects.width, objects.height):
            annotated = f"{objects.width} x {objects.height}"
            raise PrunelabError(
                f"the image {path} has {image.width} x {image.height} pixels, its annotations {annotated}"
            )
        return transform(image)

    return images.read(path, checked)


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width in which DETR's family tests an image: the shorter side 800 pixels unless the longer one would
    have more than 1333; halves are rounded up."""
    scale = min(SHORTER / min(height, width), LONGER / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def transform(image: Image.Image) -> Tensor:
    """An RGB image as DETR's family tests it: resized bilinearly, normalised with ImageNet's mean and deviation;
    [3, h, w] float32."""
    height, width = resized(image.height, image.width)
    return normalize(to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)), MEAN, STD)


def pad(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Images [C, h, w] of several sizes as one batch [B, C, H, W], zeros below and to the right, and the mask
    [B, H, W] that is True there; None where nothing was padded."""
    height, width = (max(x.shape[side] for x in samples) for side in (1, 2))
    batch = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in samples])
    if all(x.shape[1:] == (height, width) for x in samples):
        return batch, None
    mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for i, x in enumerate(samples):
        mask[i, : x.shape[1], : x.shape[2]] = False
    return batch, mask
