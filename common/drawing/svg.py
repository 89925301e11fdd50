"""Inline SVG: elements and charts as text. Colours and fonts are the page's, through CSS classes.

Whatever comes from data is escaped here. Numbers are rounded, so that the same data give the same bytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STYLES = 8  # colours of page.css and shapes of `marker`; what comes behind them pairs both anew, on broken lines

WIDTH, HEIGHT = 460.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 14.0, 46.0
STEEP = 100.0  # from this ratio of the greatest to the least height on, they are drawn by their logarithms
LEGEND_ROW, LEGEND_COLUMNS = 20.0, 2


def escape(text: object) -> str:
    """Text for elements and attributes."""
    return html.escape(str(text), quote=True)


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def element(tag: str, content: str = "", /, **attributes: Any) -> str:
    """One SVG element. `content` is markup; attribute values are escaped, `_` in names stands for `-`."""
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{number(v) if isinstance(v, float) else escape(v)}"'
        for name, v in attributes.items()
    )
    return f"<{tag}{pairs}>{content}</{tag}>" if content else f"<{tag}{pairs}/>"


def text(x: float, y: float, content: object, **attributes: Any) -> str:
    """A line of text, escaped."""
    return element("text", escape(content), x=float(x), y=float(y), **attributes)


def document(width: float, height: float, title: str, content: str, css: str) -> str:
    """An SVG picture that scales with its column and says to screen readers what it shows."""
    view = f"0 0 {number(width)} {number(height)}"
    attributes = {"class_": css, "viewBox": view, "role": "img", "aria_label": title, "width": float(width)}
    return element("svg", content, **attributes)


# -- charts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """A point. `error` is the half width of its bar; hollow marks are less certain; `label` shows on hovering."""

    x: float
    y: float
    error: float | None = None
    hollow: bool = False
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one name, joined by a line where they form a curve. Equal names look alike."""

    name: str
    marks: tuple[Mark, ...]
    joined: bool = True


def styles(names: Iterable[str]) -> dict[str, int]:
    """A style for each name, in order of first appearance."""
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _colour(style: int) -> str:
    return f"s{style % STYLES}"


def marker(x: float, y: float, style: int, hollow: bool = False, label: str = "") -> str:
    """The point's shape: circle, square, triangle, diamond, cross, down triangle, bar, star."""
    corners: Mapping[int, list[tuple[float, float]]] = {
        1: [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        2: [(0, -5.2), (5, 4), (-5, 4)],
        3: [(0, -5.6), (5.6, 0), (0, 5.6), (-5.6, 0)],
        4: [(-5, -2), (-2, -2), (-2, -5), (2, -5), (2, -2), (5, -2), (5, 2), (2, 2), (2, 5), (-2, 5), (-2, 2), (-5, 2)],
        5: [(0, 5.2), (5, -4), (-5, -4)],
        6: [(-5.5, -2.2), (5.5, -2.2), (5.5, 2.2), (-5.5, 2.2)],
        7: [(-5, -4), (0, -1.4), (5, -4), (1.4, 0), (5, 4), (0, 1.4), (-5, 4), (-1.4, 0)],
    }
    tip = element("title", escape(label)) if label else ""
    css, shape = f"mark {_colour(style)}" + (" hollow" if hollow else ""), (style + style // STYLES * 3) % STYLES
    if shape not in corners:
        return element("circle", tip, class_=css, cx=float(x), cy=float(y), r=4.4)
    points = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in corners[shape])
    return element("polygon", tip, class_=css, points=points)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float, wanted: int = 6) -> list[float]:
    """Powers of ten between two exponents, at most as many as wanted."""
    first, last = math.ceil(low), math.floor(high)
    return [10.0**power for power in range(first, last + 1, -((first - last - 1) // wanted))]


def _tick(value: float) -> str:
    """A number as short as the room beside the axis asks for."""
    if abs(value) < 1e4:
        return f"{value:g}"
    mantissa, power = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def _span(values: Collection[float], share: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _level_name(name: str, height: float, marks: Collection[tuple[float, float]]) -> str:
    """The name of a level at that height, where it covers fewest of the marks: above or below it, at its left or right
    end."""
    width = 6.5 * len(name) + 12
    left, right = (
        (LEFT, LEFT + width, LEFT + 6, "start"),
        (WIDTH - RIGHT - width, WIDTH - RIGHT, WIDTH - RIGHT - 6, "end"),
    )
    free: list[tuple[int, int, str]] = []
    for side in (-1, 1):
        middle = height + side * 10
        for first, last, x, anchor in (left, right):
            covered = sum(first - 5 < mx < last + 5 and abs(my - middle) < 13 for mx, my in marks)
            free.append((covered, len(free), text(x, middle + 4, name, class_="tick", text_anchor=anchor)))
    return min(free)[2]


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
    look: Mapping[str, int] | None = None,
) -> str:
    """A chart of curves and points with its legend; `level` draws a named horizontal line. `look` fixes the style of
    each name, so that two charts agree. Heights that are all positive and more than a hundred times apart are drawn by
    their logarithms, with bars cut where they would leave the chart."""
    series = [s for s in series if s.marks]
    if not series:
        return ""
    look = look or styles(s.name for s in series)
    marks = [m for s in series for m in s.marks]
    x0, x1 = _span([m.x for m in marks])
    heights = [m.y for m in marks] + ([level[1]] if level else [])
    steep = min(heights) > 0 and max(heights) / min(heights) > STEEP
    scale, floor = (math.log10, min(heights) / 1.5) if steep else (float, -math.inf)
    reach = heights + [m.y + sign * (m.error or 0.0) for m in marks for sign in (-1, 1)]
    y0, y1 = _span([scale(max(y, floor)) for y in reach])

    def across(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (scale(max(y, floor)) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    out: list[str] = []
    for y in decades(y0, y1) if steep else ticks(y0, y1):
        out.append(element("line", class_="rule", x1=LEFT, x2=WIDTH - RIGHT, y1=down(y), y2=down(y)))
        out.append(text(LEFT - 8, down(y) + 4, _tick(y), class_="tick", text_anchor="end"))
    base = HEIGHT - BOTTOM
    out.append(element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base))
    for x in ticks(x0, x1):
        out.append(element("line", class_="axis", x1=across(x), x2=across(x), y1=base, y2=base + 4))
        out.append(text(across(x), base + 17, _tick(x), class_="tick", text_anchor="middle"))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, class_="label", text_anchor="middle"))
    turn = f"rotate(-90 13 {number((TOP + base) / 2)})"
    out.append(text(13, (TOP + base) / 2, y_label, class_="label", text_anchor="middle", transform=turn))
    if level:
        out.append(element("line", class_="level", x1=LEFT, x2=WIDTH - RIGHT, y1=down(level[1]), y2=down(level[1])))
        places = [(across(m.x), down(m.y)) for m in marks]
        out.append(_level_name(level[0], down(level[1]), places))
    for s in series:
        style = look[s.name]
        if s.joined and len(s.marks) > 1:
            path = " ".join(f"{number(across(m.x))},{number(down(m.y))}" for m in sorted(s.marks, key=lambda m: m.x))
            broken = {"stroke_dasharray": "5 3"} if style >= STYLES else {}
            out.append(element("polyline", class_=f"curve {_colour(style)}", points=path, **broken))
        for m in s.marks:
            if m.error:
                x, high, low = across(m.x), down(m.y + m.error), down(m.y - m.error)
                out.append(element("line", class_=f"error {_colour(style)}", x1=x, x2=x, y1=high, y2=low))
    for s in series:  # marks last, so that no line covers them
        out += [marker(across(m.x), down(m.y), look[s.name], m.hollow, m.label) for m in s.marks]
    names = list(dict.fromkeys(s.name for s in series))
    for i, name in enumerate(names):
        x, y = (
            LEFT + (i % LEGEND_COLUMNS) * (WIDTH - LEFT) / LEGEND_COLUMNS,
            HEIGHT + 8 + i // LEGEND_COLUMNS * LEGEND_ROW,
        )
        out += [marker(x + 6, y, look[name]), text(x + 18, y + 4, name, class_="key")]
    rows = -(-len(names) // LEGEND_COLUMNS)
    return document(WIDTH, HEIGHT + rows * LEGEND_ROW, title, "".join(out), "chart")
