"""Zero-TPrune's own pictures: the curve the paper reports, and what the method removes from the testbed's scenes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prunelab.common.drawing import sheets, svg
from prunelab.common.drawing.figures import Context, Curves, Figure

BOARD = "trade-off"
CURVE, TABLE = "Fig. accu_flops2 (curve)", "DeiT-S main"
NAMES = {"DeiT-S": "unpruned DeiT-S", "+ATS": "ATS", "+ToMe": "ToMe"}


def curves(context: Context) -> dict[str, Curves]:
    """GFLOPs and top-1 as reported, beside the board: the curve, read off by eye, and the rows of the main table."""
    curve: dict[str, list[svg.Mark]] = {}
    table: dict[str, dict[str, float]] = {}
    for number in (line.reported for line in context.lines):
        if number.table == CURVE and (cost := re.fullmatch(r"(\S+) .*@([\d.]+)G", number.row)):
            mark = svg.Mark(float(cost[2]), number.value, hollow=True, label=f"{number.row}: {number.text} %, by eye")
            curve.setdefault(cost[1], []).append(mark)
        elif number.table == TABLE:
            table.setdefault(number.row, {})[number.column] = number.value
    series = [svg.Series(name, tuple(marks)) for name, marks in curve.items()]
    for row, values in table.items():
        if {"GFLOPs", "top-1"} <= values.keys():
            label = f"{row}: {values['top-1']:g} % at {values['GFLOPs']:g} GFLOPs"
            mark = svg.Mark(values["GFLOPs"], values["top-1"], label=label)
            series.append(svg.Series(NAMES.get(row, "Zero-TPrune"), (mark,)))
    return {BOARD: Curves("GFLOPs as the paper counts them", "top-1 on ImageNet-1k, %", series)} if series else {}


def figures(context: Context) -> list[Figure]:
    """The gallery, where its run has been made."""
    return context.drawn("gallery", "Tokens removed, stage by stage", lambda metrics: gallery(metrics["scenes"]))


def gallery(scenes: Mapping[str, Any]) -> str:
    """Each scene with what is left of it behind every pruning site."""
    grid = (int(scenes["grid"][0]), int(scenes["grid"][1]))
    patches, out = grid[0] * grid[1], []
    for item in scenes["items"]:
        kept = [(f"block {site['layer']}: {len(site['kept'])} of {patches}", site["kept"]) for site in item["sites"]]
        caption = f"a {item['label']}, called {item['dense']} unpruned and {item['pruned']} pruned"
        verdict = "right" if item["pruned"] == item["label"] else "wrong"
        picture = sheets.stages(item["image"], grid, kept, title=f"Scene with {caption}")
        out.append(f'<div class="scene">{picture}<p>{svg.escape(caption)} ({verdict})</p></div>')
    return f'<div class="scenes">{"".join(out)}</div>'
