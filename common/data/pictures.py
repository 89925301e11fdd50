"""Pictures and videos of handwritten digits that questions can be asked about (`prunelab.common.data.questions`).

A picture is a grid of 9 x 9 cells of 4 x 4 pixels, the patches of an image encoder. Four to six of its nine zones hold
a digit of 2 x 2 cells, each in a colour of its own; 24 cells, fewer where digits lie over them, hold faint quarters of
other digits, and noise lies over everything.

A video has 8 frames of 8 x 8 such cells. One digit rests in it from the first frame to the last, among faint quarters
that do not move either. One to four others cross it one after the other, each for two frames and each in another
direction.

A film has 32 such frames, a long one 64, of faint quarters that do not move. Two to four digits are in it, each in one
frame and in another quarter of it, on two by two cells that the model pools into one token.

Why this tells pruning methods apart: what is asked for lies in 4 of 81 tokens of a picture, in a few tokens of two
frames of a video, in one of a film's 512 or 1024, and nowhere else; most of the rest is background that repeats, or
looks like parts of an answer. Training and test images share no digit (`prunelab.common.data.digits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from prunelab.common.data import digits

CELL = 4  # pixels a side; a digit covers 2 x 2 cells
CONTRAST = (0.2, 0.5)  # of a fragment, relative to a digit's
NOISE = 0.1  # standard deviation, in units of full ink
NONE = -1  # no digit

PICTURE = 9  # cells a side
ZONES = 3  # zones a side
FEWEST, MOST = 4, 6  # digits in a picture
COPIES = 3  # the most digits of one class
PICTURE_FRAGMENTS = 24
INKS = torch.tensor([[1, 0.2, 0.2], [0.2, 1, 0.2], [0.3, 0.3, 1], [1, 1, 0.2], [0.2, 1, 1], [1, 0.3, 1]])  # RGB

FRAME = 8  # cells a side
FRAMES, SLOT = 8, 2  # frames in a video, and those between one crossing digit and the next
CROSSING = FRAMES // SLOT  # the most digits that cross
STEP = 4  # cells from frame to frame
VIDEO_FRAGMENTS = 16
FILM, LONG_FILM = 32, 64  # frames of a film, and of one twice as long
MOMENTS = 4  # the most digits in one
WAYS = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0]])  # left, right, up, down as (row, column)


@dataclass(frozen=True)
class Pictures:
    """Pictures [B, 3, 36, 36] float32, normalised, and what they show: `digit` [B, 9] int64 of each zone row by row
    (-1 where there is none), `ink` [B, 9] int64 its colour, a row of INKS, `favourite` [B] a class that is there 0 to
    3 times while others are there once at most, and `owner` [B, 81] the zone whose digit a cell belongs to, or -1."""

    pixels: Tensor
    digit: Tensor
    ink: Tensor
    favourite: Tensor
    owner: Tensor

    def cells(self, values: Tensor) -> Tensor:
        """Something known of each zone [B, 9] for the cells of its digit [B, 81], -1 elsewhere."""
        return torch.where(self.owner < 0, NONE, values.gather(1, self.owner.clamp(min=0)))


@dataclass(frozen=True)
class Videos:
    """Videos [B, 8, 3, 32, 32] float32, normalised, and what they show: `resting` [B] int64, the digit that is always
    there, `digit` [B, 4] those that cross, in the order of time (-1: nothing crosses then), `way` [B, 4] their
    directions, rows of WAYS, and `owner` [B, 8, 64] which of them a cell of a frame belongs to, 4 for the digit that
    rests, or -1."""

    pixels: Tensor
    resting: Tensor
    digit: Tensor
    way: Tensor
    owner: Tensor

    def cells(self, crossing: Tensor, resting: Tensor) -> Tensor:
        """Something known of the crossing digits [B, 4] and of the resting one [B] for their cells [B, 8, 64], -1
        elsewhere."""
        values = torch.cat([crossing, resting.unsqueeze(1)], 1).gather(1, self.owner.flatten(1).clamp(min=0))
        return torch.where(self.owner < 0, NONE, values.view_as(self.owner))


@dataclass(frozen=True)
class Films:
    """Films [B, T, 3, 32, 32] float32, normalised, and what they show: `digit` [B, 4] int64 in the order of time (-1
    where there is none), `quarter` [B, 4] of the frame that each is in, row by row, and `owner` [B, T, 64] which of
    them a cell of a frame belongs to, or -1."""

    pixels: Tensor
    digit: Tensor
    quarter: Tensor
    owner: Tensor

    def cells(self, values: Tensor) -> Tensor:
        """Something known of each digit [B, 4] for its cells [B, 32, 64], -1 elsewhere."""
        own = values.gather(1, self.owner.flatten(1).clamp(min=0)).view_as(self.owner)
        return torch.where(self.owner < 0, NONE, own)


def pictures(
    split: digits.Split, count: int, generator: torch.Generator, clutter: float = 1.0, deformed: bool = False
) -> Pictures:
    """Pictures of digits of a split; clutter scales the contrast of fragments, deformed: see `digits.deform`."""
    zones, sample = ZONES**2, torch.arange(count).unsqueeze(1)
    number = FEWEST + _draw(generator, MOST - FEWEST + 1, count, 1)
    copies = _draw(generator, COPIES + 1, count, 1)
    classes = _shuffled(generator, count, 10)
    favourite, others = classes[:, :1], classes[:, 1:]
    turn = torch.arange(zones)
    named = torch.where(turn < copies, favourite, others.gather(1, (turn - copies).clamp(min=0)))
    named = named.masked_fill(turn >= number, NONE)
    order = _shuffled(generator, count, zones)
    digit = named.gather(1, order)
    ink = _shuffled(generator, count, len(INKS)).gather(1, order.clamp(max=len(INKS) - 1))

    side, room = PICTURE // ZONES, PICTURE // ZONES - 1
    zone = torch.arange(zones)
    row = zone // ZONES * side + _draw(generator, room, count, zones)
    column = zone % ZONES * side + _draw(generator, room, count, zones)
    corner = row * PICTURE + column

    canvas = _fragments(split, count, PICTURE**2, PICTURE_FRAGMENTS, clutter, generator, INKS)
    strokes = _quarters(_handwritten(split, digit, generator, deformed)) * INKS[ink][:, :, None, :, None, None]
    spot = corner.unsqueeze(2) + _block(PICTURE)  # [B, 9, 4]
    shown = (digit != NONE)[..., None].expand_as(spot)
    where = (sample.unsqueeze(2).expand_as(spot)[shown], spot[shown])
    canvas[where] = strokes[shown]
    owner = torch.full((count, PICTURE**2), NONE)
    owner[where] = zone.unsqueeze(1).expand_as(spot)[shown]
    return Pictures(_finished(canvas, generator), digit, ink, favourite[:, 0], owner)


def videos(
    split: digits.Split, count: int, generator: torch.Generator, clutter: float = 1.0, deformed: bool = False
) -> Videos:
    """Videos of digits of a split; clutter and deformed as in `pictures`."""
    sample, places = torch.arange(count), FRAME - 1  # places that a digit has along a side
    classes = _shuffled(generator, count, 10)
    resting, digit = classes[:, 0], classes[:, 1 : 1 + CROSSING]
    number = 1 + _draw(generator, CROSSING, count, 1)
    digit = digit.masked_fill(_shuffled(generator, count, CROSSING) >= number, NONE)
    way = _shuffled(generator, count, CROSSING)

    still = _draw(generator, places, count, 2)  # row and column of the digit that rests
    # A digit that crosses keeps clear of the resting one: along its way it may be anywhere, across it on another line.
    upright = way // 2  # 0: its way is along a row, 1: along a column
    line = torch.where(upright == 0, still[:, :1], still[:, 1:])
    clear = (torch.arange(places) - line.unsqueeze(2)).abs() >= 2
    across = pick(clear, generator)
    travel = STEP * (SLOT - 1)
    start = _draw(generator, places - travel, count, CROSSING)
    ahead = WAYS[way].sum(-1)  # 1 or -1
    along = torch.where(ahead > 0, start, places - 1 - start).unsqueeze(2) + STEP * ahead.unsqueeze(2) * torch.arange(
        SLOT
    )
    across = across.unsqueeze(2).expand_as(along)
    row = torch.where(upright.unsqueeze(2) == 0, across, along).flatten(1)  # [B, 8]
    column = torch.where(upright.unsqueeze(2) == 0, along, across).flatten(1)
    shown = (digit != NONE).repeat_interleave(SLOT, 1)  # [B, 8]

    canvas = _fragments(split, count, FRAME**2, VIDEO_FRAGMENTS, clutter, generator, torch.ones(1, 3))
    owner = torch.full((count, FRAME**2), NONE)
    block = _block(FRAME)
    spot = (still[:, :1] * FRAME + still[:, 1:]) + block  # [B, 4]
    canvas[sample.unsqueeze(1), spot] = _quarters(_handwritten(split, resting, generator, deformed))
    owner[sample.unsqueeze(1), spot] = CROSSING

    canvas = canvas.unsqueeze(1).repeat(1, FRAMES, 1, 1, 1, 1)
    owner = owner.unsqueeze(1).repeat(1, FRAMES, 1)
    strokes = _quarters(_handwritten(split, digit, generator, deformed)).repeat_interleave(SLOT, 1)  # [B, 8, 4, ...]
    spot = (row * FRAME + column).unsqueeze(2) + block  # [B, 8, 4]
    times = torch.arange(FRAMES).unsqueeze(1)
    where = [part.expand_as(spot)[shown] for part in (sample[:, None, None], times, spot)]
    canvas[tuple(where)] = strokes[shown].expand(-1, -1, 3, -1, -1)
    owner[tuple(where)] = (times // SLOT).expand_as(spot)[shown]
    return Videos(_finished(canvas, generator), resting, digit, way, owner)


def films(
    split: digits.Split,
    count: int,
    generator: torch.Generator,
    clutter: float = 1.0,
    deformed: bool = False,
    frames: int = FILM,
) -> Films:
    """Films of digits of a split, of so many frames; clutter and deformed as in `pictures`."""
    sample = torch.arange(count).unsqueeze(1)
    number = 2 + _draw(generator, MOMENTS - 1, count, 1)
    digit = _shuffled(generator, count, 10)[:, :MOMENTS]
    digit = digit.masked_fill(_shuffled(generator, count, MOMENTS) >= number, NONE)
    time = _shuffled(generator, count, frames)[:, :MOMENTS].sort(1).values
    quarter = _shuffled(generator, count, MOMENTS)
    half, places = FRAME // 2, FRAME // 4  # of cells, and of places in steps of two cells
    row = quarter // 2 * half + 2 * _draw(generator, places, count, MOMENTS)
    column = quarter % 2 * half + 2 * _draw(generator, places, count, MOMENTS)

    canvas = _fragments(split, count, FRAME**2, VIDEO_FRAGMENTS, clutter, generator, torch.ones(1, 3))
    canvas = canvas.unsqueeze(1).repeat(1, frames, 1, 1, 1, 1)
    owner = torch.full((count, frames, FRAME**2), NONE)
    spot = (row * FRAME + column).unsqueeze(2) + _block(FRAME)  # [B, 4, 4]
    shown = digit != NONE
    where = [part.expand_as(spot)[shown] for part in (sample.unsqueeze(2), time.unsqueeze(2), spot)]
    strokes = _quarters(_handwritten(split, digit, generator, deformed))
    canvas[tuple(where)] = strokes[shown].expand(-1, -1, 3, -1, -1)
    owner[tuple(where)] = torch.arange(MOMENTS).view(1, -1, 1).expand_as(spot)[shown]
    return Films(_finished(canvas, generator), digit, quarter, owner)


def pick(mask: Tensor, generator: torch.Generator) -> Tensor:
    """The place of one True entry of each row of a mask [..., N], by lot; 0 where there is none."""
    return (torch.rand(mask.shape, generator=generator) + 1e-6).mul(mask).argmax(-1)


def displayed(pixels: Tensor) -> Tensor:
    """Normalised pixels [..., 3, H, W] as an image viewer takes them: [..., H, W, 3] uint8."""
    ink = (pixels * digits.SCALE + digits.SHIFT).clamp(0, 1)
    return (255 * ink).round().to(torch.uint8).movedim(-3, -1)


def _draw(generator: torch.Generator, below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=generator)


def _shuffled(generator: torch.Generator, count: int, length: int) -> Tensor:
    """Permutations [count, length] of the numbers below `length`."""
    return torch.rand(count, length, generator=generator).argsort(1)


def _block(side: int) -> Tensor:
    """The four cells of a digit, counted from its upper left one in a grid of that side."""
    return torch.tensor([0, 1, side, side + 1])


@cache
def _by_class(split: digits.Split) -> tuple[Tensor, Tensor, Tensor]:
    """Images [n, 8, 8] of a split sorted by class, the first of each class, and how many it has [10]."""
    images, labels = digits.digits(split)
    number = labels.bincount(minlength=10)
    return images[labels.argsort(stable=True)], number.cumsum(0) - number, number


def _handwritten(split: digits.Split, digit: Tensor, generator: torch.Generator, deformed: bool) -> Tensor:
    """An image [..., 8, 8] of each digit [...], by lot; where there is none, of any."""
    images, first, number = _by_class(split)
    named = digit.clamp(min=0)
    lot = (torch.rand(digit.shape, generator=generator) * number[named]).long()
    drawn = images[first[named] + lot]
    return digits.deform(drawn.flatten(0, -3), generator).view_as(drawn) if deformed else drawn


def _quarters(images: Tensor) -> Tensor:
    """Images [..., 8, 8] as their quarters [..., 4, 1, 4, 4]: upper left, upper right, lower left, lower right."""
    cut = images.unflatten(-1, (2, CELL)).unflatten(-3, (2, CELL))  # [..., 2, 4, 2, 4]
    return cut.transpose(-3, -2).flatten(-4, -3).unsqueeze(-3)


def _fragments(
    split: digits.Split, count: int, cells: int, number: int, clutter: float, generator: torch.Generator, inks: Tensor
) -> Tensor:
    """Canvases [count, cells, 3, 4, 4] with faint quarters of digits in `number` cells, each in one of the inks."""
    images, _ = digits.digits(split)
    quarters = _quarters(images)[_draw(generator, len(images), count, number), _draw(generator, 4, count, number)]
    low, high = CONTRAST
    contrast = clutter * (low + (high - low) * torch.rand(count, number, 1, generator=generator))
    colour = contrast * inks[_draw(generator, len(inks), count, number)]  # [count, number, 3]
    canvas = torch.zeros(count, cells, 3, CELL, CELL)
    canvas[torch.arange(count).unsqueeze(1), _shuffled(generator, count, cells)[:, :number]] = (
        quarters * colour[..., None, None]
    )
    return canvas


def _finished(canvas: Tensor, generator: torch.Generator) -> Tensor:
    """Cells [..., side * side, 3, 4, 4] as normalised pixels [..., 3, 4 * side, 4 * side] under noise."""
    side = round(canvas.shape[-4] ** 0.5)
    grid = canvas.unflatten(-4, (side, side))  # [..., row, column, 3, 4, 4]
    pixels = grid.movedim(-3, -5).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    pixels = pixels + NOISE * torch.randn(pixels.shape, generator=generator)
    return (pixels - digits.SHIFT) / digits.SCALE
