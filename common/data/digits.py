"""Handwritten digits in scenes: find one digit among fragments of others, and name it.

A scene is a grid of 10 x 10 cells of 4 x 4 pixels, the patches of a vision transformer. One 8 x 8 digit of
scikit-learn's set lies on four cells at a random place; 24 of the other cells hold faint quarters of other digits, and
noise lies over everything. The label is the digit.

Why this tells pruning methods apart: the label lives in 4 of 100 tokens. A method that loses them early loses the
answer, and no other token can make up for it; over 70 tokens are empty and cheap to lose; 24 look like parts of an
answer, so that mere contrast or novelty does not find the right ones.

The 1797 digits are split into training and test images before scenes are composed: no stroke of a test scene, be it
digit or fragment, has been seen in training.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError

Split = Literal["train", "test"]

GRID = 10  # cells a side
CELL = 4  # pixels a side; a digit covers 2 x 2 cells
FRAGMENTS = 24  # cells of clutter in a scene, fewer where the digit lies over them
CONTRAST = (0.2, 0.5)  # of a fragment, relative to the digit's
NOISE = 0.1  # standard deviation, in units of a digit's full ink
TEST_IMAGES = 400
SHIFT, SCALE = 0.1, 0.25  # pixels are mapped to (x - SHIFT) / SCALE, near mean 0 and variance 1 where there is ink


@cache
def digits(split: Split) -> tuple[Tensor, Tensor]:
    """The digits of a split: images [n, 8, 8] float32 in [0, 1] and labels [n] int64, in a fixed shuffled order."""
    from sklearn.datasets import load_digits

    if split not in get_args(Split):
        raise PrunelabError(f"there is no split '{split}' of the digits; use train or test")
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    chosen = order[:-TEST_IMAGES] if split == "train" else order[-TEST_IMAGES:]
    images = torch.from_numpy(data.images).float() / 16
    return images[chosen], torch.from_numpy(data.target).long()[chosen]


def deform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits [n, 8, 8] turned, scaled, sheared and shifted a little, each in its own way."""
    n = len(images)

    def around(centre: float, spread: float) -> Tensor:
        return centre + spread * (2 * torch.rand(n, generator=generator) - 1)

    angle, shear = around(0, 0.2), around(0, 0.15)  # radians, and share of the height
    wide, high = around(1, 0.125), around(1, 0.125)
    right, down = around(0, 0.12), around(0, 0.12)  # half widths: 0.12 is about half a pixel
    row_x = torch.stack([wide * angle.cos(), shear - angle.sin(), right], -1)
    row_y = torch.stack([angle.sin(), high * angle.cos(), down], -1)
    where = F.affine_grid(torch.stack([row_x, row_y], 1), [n, 1, 8, 8], align_corners=False)
    return F.grid_sample(images.unsqueeze(1), where, align_corners=False).squeeze(1)


def scenes(
    split: Split, count: int, seed: int | torch.Generator, clutter: float = 1.0, deformed: bool = False
) -> tuple[Tensor, Tensor]:
    """Scenes [count, 1, 40, 40] float32, normalised, and labels [count] int64; the same for the same arguments.

    seed: a number, or a generator to go on drawing from. clutter scales the contrast of the fragments (training
    starts without them). deformed: also `deform` the digits, to train on more shapes than there are images.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    images, labels = digits(split)
    cells, sample = GRID * GRID, torch.arange(count).unsqueeze(1)

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    chosen = draw(len(images), count)
    digit = deform(images[chosen], generator) if deformed else images[chosen]

    quarters = _quarters(images)[draw(len(images), count, FRAGMENTS), draw(4, count, FRAGMENTS)]  # [count, 24, 4, 4]
    low, high = CONTRAST
    contrast = clutter * (low + (high - low) * torch.rand(count, FRAGMENTS, 1, 1, generator=generator))
    places = torch.rand(count, cells, generator=generator).argsort(1)[:, :FRAGMENTS]
    scene = torch.zeros(count, cells, CELL, CELL)
    scene[sample, places] = quarters * contrast

    top, left = draw(GRID - 1, count, 1), draw(GRID - 1, count, 1)
    scene[sample, top * GRID + left + torch.tensor([0, 1, GRID, GRID + 1])] = _quarters(digit)

    side = GRID * CELL
    scene = scene.view(count, GRID, GRID, CELL, CELL).transpose(2, 3).reshape(count, 1, side, side)
    scene = scene + NOISE * torch.randn(scene.shape, generator=generator)
    return (scene - SHIFT) / SCALE, labels[chosen]


def _quarters(images: Tensor) -> Tensor:
    """Digits [n, 8, 8] as their upper left, upper right, lower left and lower right quarter [n, 4, 4, 4]."""
    return images.view(-1, 2, CELL, 2, CELL).transpose(2, 3).reshape(-1, 4, CELL, CELL)
