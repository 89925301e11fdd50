"""Charts: ticks, marks, names of levels, and text that is not ours."""

from __future__ import annotations

import re

import pytest

from prunelab.common.drawing import svg

EVIL = '<script>alert("1")</script>'


@pytest.mark.parametrize(("low", "high"), [(0, 1), (76.1, 79.8), (0.0012, 0.0025), (-3, 1200), (1e6, 1e6 + 1)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    assert 3 <= len(found) <= 9 and found == sorted(found)
    assert low - 1e-6 <= found[0] and found[-1] <= high + 1e-6


def test_charts_escape_and_tell_marks_apart() -> None:
    marks = (svg.Mark(1, 2, 0.5, label=EVIL), svg.Mark(2, 3, hollow=True))
    chart = svg.chart([svg.Series(EVIL, marks)], title=EVIL, x_label=EVIL, y_label=EVIL, level=(EVIL, 4.0))
    assert "<script" not in chart and chart.count("hollow") == 1 and chart.count('class="error') == 1
    one = svg.chart([svg.Series("a", (svg.Mark(1, 1),))], title="", x_label="", y_label="")
    assert "nan" not in one
    assert svg.chart([], title="", x_label="", y_label="") == ""
    shapes = [svg.marker(0, 0, style).replace(f"s{style}", "") for style in range(svg.STYLES)]
    assert len(set(shapes)) == svg.STYLES
    many = svg.styles(map(str, range(3 * svg.STYLES)))
    assert len({svg.marker(0, 0, style) for style in many.values()}) == len(many), "colour and shape together"


def test_a_levels_name_covers_no_mark_where_there_is_room():
    for side, anchor in ((0.0, "end"), (1.0, "start")):
        marks = (*(svg.Mark(side, y) for y in (0.9, 1.0, 1.1)), svg.Mark(0.5, 0.0))
        drawn = svg.chart([svg.Series("a", marks)], title="", x_label="", y_label="", level=("dense", 1.0))
        assert f'text-anchor="{anchor}">dense<' in drawn


def test_heights_far_apart_are_drawn_by_their_logarithms():
    def heights(*values: float, error: float = 0.0) -> tuple[str, list[float]]:
        marks = tuple(svg.Mark(float(i), value, error) for i, value in enumerate(values))
        drawn = svg.chart([svg.Series("a", marks)], title="t", x_label="x", y_label="y")
        curve = re.search(r'points="([^"]+)"', drawn)
        assert curve
        return drawn, [float(point.split(",")[1]) for point in curve[1].split()]

    drawn, (low, middle, high) = heights(10, 1e3, 1e5, error=20.0)
    assert low - middle == pytest.approx(middle - high, abs=0.1) and ">1e5<" in drawn
    assert all(0 <= float(y) <= svg.HEIGHT for y in re.findall(r'y[12]="([^"]+)"', drawn)), "bars stay inside"
    _, (low, middle, high) = heights(10, 20, 30)
    assert low - middle == pytest.approx(middle - high, abs=0.1)
    assert heights(-1, 1e4, 2e4)[1][1] < heights(1, 1e4, 2e6)[1][0], "what is not positive has no logarithm"
