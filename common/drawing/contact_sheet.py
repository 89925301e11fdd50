"""Pictures of what pruning leaves: frames (or crops) side by side, veiled where they have nothing left."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from prunelab.common.drawing.sheets import amount as amount
from prunelab.common.tokens.inspection import Stage

GAP, LINE = 8, 18
LARGE, SMALL, COLUMNS = 240, 132, 8  # sides of a panel where there are few or many, panels a row
VEIL, EXTRA = (200, 200, 204), (20, 90, 220)  # colours of what is gone, and of what got more than it had


def veiled(picture: Image.Image, shares: Tensor) -> Image.Image:
    """A picture whose cells [height, width] are the paler the smaller their share is, 0 being gone; shares above 1 are
    tinted."""
    left = shares.numpy()
    size, nearest = picture.size, Image.Resampling.NEAREST
    gone = Image.fromarray((215 * (1 - left.clip(0, 1))).astype(np.uint8)).resize(size, nearest)
    more = Image.fromarray((60 * (left - 1).clip(0, 2)).astype(np.uint8)).resize(size, nearest)
    shown = Image.composite(Image.new("RGB", size, VEIL), picture, gone)
    return Image.composite(Image.new("RGB", size, EXTRA), shown, more)


def draw(
    pictures: Sequence[Image.Image], tokens: Sequence[float], stages: Sequence[Stage], lines: Sequence[str]
) -> Image.Image:
    """The frames as they are, and below (one picture: beside) them what is left behind each site, every frame with its
    tokens; above all the lines of text."""
    count = len(pictures)
    side = LARGE if count <= 2 else SMALL
    across = min(count, COLUMNS)
    rows = -(-count // across)
    unpruned = [picture.convert("RGB").resize((side, side)) for picture in pictures]
    bands = [("unpruned", [(picture, amount(n)) for picture, n in zip(unpruned, tokens, strict=True)])]
    for stage in stages:
        captions = [f"{amount(n)} of {amount(full)}" for n, full in zip(stage.tokens, tokens, strict=True)]
        left = [veiled(picture, share) for picture, share in zip(unpruned, stage.shares, strict=True)]
        total = f"{stage.name}: {amount(sum(stage.tokens))} of {amount(sum(tokens))} tokens"
        bands.append((total, list(zip(left, captions, strict=True))))
    wide, high = across * (side + GAP), rows * (side + LINE) + LINE + GAP
    beside = count == 1
    width = max(wide * (len(bands) if beside else 1), 2 * LARGE) + GAP
    font, bold = ImageFont.load_default(size=13), ImageFont.load_default(size=14)
    text = [part for line in lines for part in textwrap.wrap(line, max(20, width // 8)) or [""]]
    top = GAP + LINE * len(text) + GAP
    sheet = Image.new("RGB", (width, top + high * (1 if beside else len(bands))), "white")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(text):
        pen.text((GAP, GAP + LINE * i), line, fill="black", font=bold)
    for number, (title, panels) in enumerate(bands):
        start, up = (GAP + wide * number, top) if beside else (GAP, top + high * number)
        pen.text((start, up), title, fill=(60, 60, 60), font=font)
        for i, (panel, caption) in enumerate(panels):
            x, y = start + i % across * (side + GAP), up + LINE + i // across * (side + LINE)
            sheet.paste(panel, (x, y))
            label = caption if count == 1 else f"{i + 1}: {caption}"
            pen.text((x, y + side + 1), label, fill=(90, 90, 90), font=font)
    return sheet
