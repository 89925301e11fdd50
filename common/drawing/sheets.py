"""Contact sheets as inline SVG: what pruning leaves of pictures and videos, from records of `common.tasks.looks`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from prunelab.common.drawing.svg import document, element, escape, text

WHOLE = 100  # as in the records: what a patch has without pruning
LONE, MANY, GAP, LINE = 150.0, 58.0, 5.0, 13.0  # sides of a panel of a picture and of a video
COLOURS = 48  # of an image in the page


def looks(found: Mapping[str, Any]) -> str:
    """All questions of a record with their sheets, as HTML."""
    out = []
    for item in found["items"]:
        verdicts = [f"{item[name]} ({'right' if item[name] == item['answer'] else 'wrong'})" for name in _ASKED]
        said = f"{item['question']}: {verdicts[0]} unpruned, {verdicts[1]} pruned"
        out.append(f'<div class="scene">{sheet(item, said)}<p>{escape(said)}</p></div>')
    return f'<div class="scenes">{"".join(out)}</div>'


_ASKED = ("dense", "pruned")


def sheet(item: Mapping[str, Any], title: str) -> str:
    """The frames with their tokens, and below them (a picture: beside it) what is left behind each site."""
    images, grid = [png(frame) for frame in item["frames"]], (int(item["grid"][0]), int(item["grid"][1]))
    lone = len(images) == 1
    side = LONE if lone else MANY
    bands: list[tuple[str, Sequence[float], Sequence[str] | None]] = [("unpruned", item["tokens"], None)]
    bands += [(stage["name"], stage["tokens"], stage["shares"]) for stage in item["stages"]]
    wide, high = len(images) * (side + GAP) - GAP, side + 2 * LINE + GAP
    out = []
    for number, (name, tokens, shares) in enumerate(bands):
        left, top = (number * (wide + GAP), 0.0) if lone else (0.0, number * high)
        out.append(text(left, top + 9, f"{name}: {amount(sum(tokens))} tokens", class_="tick"))
        for i, (image, count) in enumerate(zip(images, tokens, strict=True)):
            x, y = left + i * (side + GAP), top + LINE
            out.append(element("image", href=image, x=x, y=y, width=side, height=side))
            if shares is not None:
                out.append(veil(bytes.fromhex(shares[i]), grid, x, y, side))
            out.append(element("rect", class_="frame", x=x, y=y, width=side, height=side))
            if not lone:
                out.append(text(x + side / 2, y + side + 10, amount(count), class_="tick", text_anchor="middle"))
    size = ((wide + GAP) * len(bands) - GAP, high) if lone else (wide, high * len(bands))
    return document(*size, title, "".join(out), "stages")


def veil(shares: bytes, grid: tuple[int, int], x: float, y: float, side: float) -> str:
    """Covers over the cells of a panel: the less a patch has left the denser, and a tint where it has more than it had.
    Neighbours of a row that have alike share one."""
    wide, high, out = side / grid[1], side / grid[0], []
    for row in range(grid[0]):
        cells, start = shares[row * grid[1] : (row + 1) * grid[1]], 0
        for column in range(1, grid[1] + 1):
            if column < grid[1] and cells[column] == cells[start]:
                continue
            place = {"x": x + start * wide, "y": y + row * high, "width": (column - start) * wide, "height": high}
            if cells[start] < WHOLE:
                out.append(element("rect", class_="gone", opacity=round(0.9 * (1 - cells[start] / WHOLE), 2), **place))
            elif cells[start] > WHOLE:
                out.append(element("rect", fill="#2060d0", opacity=round(0.3 * (cells[start] / WHOLE - 1), 2), **place))
            start = column
    return "".join(out)


def amount(tokens: float) -> str:
    """A number of tokens, short."""
    return f"{tokens:.1f}".removesuffix(".0")


def png(rows: Sequence[str]) -> str:
    """A colour image, one row of hexadecimal RGB bytes a line, as a data URI of few colours."""
    from PIL import Image

    lines = [bytes.fromhex(row) for row in rows]
    buffer = io.BytesIO()
    image = Image.frombytes("RGB", (len(lines[0]) // 3, len(lines)), b"".join(lines))
    image.quantize(COLOURS).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
