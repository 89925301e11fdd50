"""Sheets: pictures and videos beside what pruning leaves of them, as SVG for the page and for files of their own."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prunelab.common.drawing.svg import document, element, escape, number, text

if TYPE_CHECKING:
    from PIL import Image

WHOLE = 100  # as in the records: what a patch has without pruning
LONE, MANY, SCENE = 150.0, 58.0, 100.0  # sides of a panel on the page: of a picture, of a video's frame, of a scene
GAP, LINE = 5.0, 13.0
COLOURS = 48  # of an image in the page
STYLE = """text { font: 11px system-ui, sans-serif; fill: #444; } .heading { font-size: 13px; fill: #111; }
.gone, .fresh { shape-rendering: crispEdges; } .gone { fill: #cdcdd2; }
.more { fill: #2060d0; } .fresh { fill: #d3bd9d; }
.hatch { stroke: #6b4526; stroke-width: .9; } .frame { fill: none; stroke: #999; stroke-width: .6; }
.paper { fill: #fff; }"""


@dataclass(frozen=True)
class Panel:
    """An image, as a data URI, under what its patches have left.

    shares: one byte a patch of the grid (height, width), row by row, WHOLE where as much as without pruning; None shows
    the image as it is. before: the shares one stage earlier, where patches that were left then shall be marked.
    """

    image: str
    caption: str = ""
    grid: tuple[int, int] = (1, 1)
    shares: bytes | None = None
    before: bytes | None = None
    css: str = ""


Band = tuple[str, Sequence[Panel]]  # a stage of pruning in words, and its panels


def sheet(
    bands: Sequence[Band],
    title: str,
    *,
    side: float,
    ratio: float = 1.0,
    columns: int = 64,
    lines: Sequence[str] = (),
    least: float = 0.0,
) -> str:
    """Bands of panels below each other; where each has one panel, beside each other.

    side: height of a panel, ratio: its width over it. columns: panels a row. lines: above all. least: width at least.
    """
    count = max(len(panels) for _, panels in bands)
    beside, rows, across = count == 1, -(-count // columns), min(count, columns)
    captions = any(panel.caption for _, panels in bands for panel in panels)
    cell_wide, cell_high = side * ratio + GAP, side + (LINE if captions else 0.0)
    wide, high = across * cell_wide - GAP, LINE + rows * cell_high + GAP
    width = max((wide + GAP) * len(bands) - GAP if beside else wide, least)
    headings = [part for line in lines for part in textwrap.wrap(line, max(24, int(width / 6.8))) or [""]]
    top = 1.4 * LINE * len(headings) + (GAP if headings else 0.0)
    out = [text(0, 1.4 * LINE * (i + 0.7), line, class_="heading") for i, line in enumerate(headings)]
    for place, (name, panels) in enumerate(bands):
        left, down = (place * (wide + GAP), top) if beside else (0.0, top + place * high)
        out.append(text(left, down + 9, name, class_="tick"))
        for i, panel in enumerate(panels):
            x, y = left + i % across * cell_wide, down + LINE + i // across * cell_high
            out.append(_drawn(panel, x, y, side * ratio, side))
    return document(width, top + (high if beside else high * len(bands)), title, "".join(out), "stages")


def _drawn(panel: Panel, x: float, y: float, width: float, height: float) -> str:
    place = {"x": x, "y": y, "width": width, "height": height}
    given = {"class_": panel.css} if panel.css else {}
    out = [element("image", href=panel.image, preserveAspectRatio="none", **given, **place), cover(panel, **place)]
    out.append(element("rect", class_="frame", **place))
    if panel.caption:
        out.append(text(x + width / 2, y + height + 10, panel.caption, class_="tick", text_anchor="middle"))
    return "".join(out)


def cover(panel: Panel, x: float, y: float, width: float, height: float) -> str:
    """What lies over the cells of a panel: the less a patch has left the denser, a tint where it has more than it had,
    and a mark where it left at this very stage. Neighbours of a row that have alike share one."""
    if panel.shares is None:
        return ""
    rows, columns = panel.grid
    wide, high, out = width / columns, height / rows, []
    for row in range(rows):
        here = slice(row * columns, (row + 1) * columns)
        cells = panel.shares[here]
        lost = [False] * columns if panel.before is None else [a < b for a, b in zip(cells, panel.before[here])]
        start = 0
        for column in range(1, columns + 1):
            alike = column < columns and cells[column] == cells[start] and not (lost[column] or lost[start])
            if alike:
                continue
            at = {"x": x + start * wide, "y": y + row * high, "width": (column - start) * wide, "height": high}
            if lost[start]:
                out.append(element("rect", class_="fresh", **at))
                end = {"x1": at["x"], "y1": at["y"] + high, "x2": at["x"] + at["width"], "y2": at["y"]}
                out.append(element("line", class_="hatch", **end))
            elif cells[start] < WHOLE:
                out.append(element("rect", class_="gone", opacity=round(0.9 * (1 - cells[start] / WHOLE), 2), **at))
            elif cells[start] > WHOLE:
                tint = {"class_": "more", "fill": "#2060d0", "opacity": round(0.3 * (cells[start] / WHOLE - 1), 2)}
                out.append(element("rect", **tint, **at))
            start = column
    return "".join(out)


def standalone(drawing: str) -> str:
    """A sheet as a file of its own: with its namespace, style and a white ground, and a margin around."""
    head, _, rest = drawing.partition(">")
    _, _, view = head.partition('viewBox="0 0 ')
    width, height = (float(size) for size in view.partition('"')[0].split())
    outer = {"viewBox": f"{-GAP:g} {-GAP:g} {number(width + 2 * GAP)} {number(height + 2 * GAP)}"}
    outer |= {"width": number(1.5 * (width + 2 * GAP)), "height": number(1.5 * (height + 2 * GAP))}
    ground = element("rect", class_="paper", x=-GAP, y=-GAP, width=width + 2 * GAP, height=height + 2 * GAP)
    content = element("style", STYLE) + ground + rest.removesuffix("</svg>")
    return element("svg", content, xmlns="http://www.w3.org/2000/svg", **outer) + "\n"


# -- what records hold -----------------------------------------------------------------------------------------------


def looks(results: Mapping[str, Any]) -> str:
    """All questions of a record of `common.tasks.looks` with their sheets, as HTML."""
    out = []
    for item in results["items"]:
        verdicts = [f"{item[name]} ({'right' if item[name] == item['answer'] else 'wrong'})" for name in _ASKED]
        heading = f"{item['question']}: {verdicts[0]} unpruned, {verdicts[1]} pruned"
        out.append(f'<div class="scene">{look(item, heading)}<p>{escape(heading)}</p></div>')
    return f'<div class="scenes">{"".join(out)}</div>'


_ASKED = ("dense", "pruned")


def look(item: Mapping[str, Any], title: str) -> str:
    """The frames with their tokens, and below them (a picture: beside it) what is left behind each site."""
    grid, many = (int(item["grid"][0]), int(item["grid"][1])), len(item["frames"]) > 1
    panels = [
        Panel(png(frame), amount(count) if many else "", grid)
        for frame, count in zip(item["frames"], item["tokens"], strict=True)
    ]
    bands = [(f"unpruned: {amount(sum(item['tokens']))} tokens", panels)]
    for stage in item["stages"]:
        left = [
            replace(panel, shares=bytes.fromhex(shares), caption=amount(count) if many else "")
            for panel, shares, count in zip(panels, stage["shares"], stage["tokens"], strict=True)
        ]
        bands.append((f"{stage['name']}: {amount(sum(stage['tokens']))} tokens", left))
    return sheet(bands, title, side=MANY if many else LONE)


def stages(
    rows: Sequence[str], grid: tuple[int, int], kept: Sequence[tuple[str, Collection[int]]], *, title: str
) -> str:
    """A greyscale image, then one panel a stage: patches that it removed are marked, those removed before are blank.

    `kept` names each stage and the indices of the patches that went on from it, counted row by row in the grid.
    """
    image, before = png(rows, "L"), bytes([WHOLE]) * (grid[0] * grid[1])
    bands: list[Band] = [("input", [Panel(image, css="ink")])]
    for name, indices in kept:
        after = bytes(WHOLE * (i in indices) for i in range(grid[0] * grid[1]))
        bands.append((name, [Panel(image, "", grid, after, before, "ink")]))
        before = bytes(min(pair) for pair in zip(before, after, strict=True))
    return sheet(bands, title, side=SCENE)


def amount(tokens: float) -> str:
    """A number of tokens, short."""
    return f"{tokens:.1f}".removesuffix(".0")


# -- images ----------------------------------------------------------------------------------------------------------


def png(rows: Sequence[str], mode: str = "RGB") -> str:
    """An image, one row of hexadecimal bytes a line (`RGB`, or `L` for greys), as a data URI of few colours."""
    from PIL import Image

    lines = [bytes.fromhex(row) for row in rows]
    image = Image.frombytes(mode, (len(lines[0]) // len(mode), len(lines)), b"".join(lines))
    return _uri(image.quantize(COLOURS) if mode == "RGB" else image, "PNG")


def photo(image: Image.Image) -> str:
    """An image of any size as a data URI."""
    return _uri(image.convert("RGB"), "JPEG" if min(image.size) > 64 else "PNG")


def _uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
