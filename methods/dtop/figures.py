"""DToP's own pictures: which tokens of the testbed's scenes leave at which head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunelab.common.drawing import sheets, svg
from prunelab.common.drawing.figures import Context, Figure


def figures(context: Context) -> list[Figure]:
    """The scenes, where their run has been made."""
    return context.drawn("scenes", "Tokens that left, head by head", lambda metrics: exits(metrics["scenes"]))


def exits(scenes: Mapping[str, Any]) -> str:
    """Each scene with the tokens that are left behind every head, and how much of its map came out right."""
    grid = (int(scenes["grid"][0]), int(scenes["grid"][1]))
    tokens, out = grid[0] * grid[1], []
    for item in scenes["items"]:
        kept = [(f"block {site['layer']}: {len(site['kept'])} of {tokens}", site["kept"]) for site in item["sites"]]
        shown = ", ".join(map(str, item["classes"])) or "no digit"
        caption = f"{shown}: {item['right']:g} % of pixels right"
        picture = sheets.stages(item["image"], grid, kept, title=f"Scene of {caption}")
        out.append(f'<div class="scene">{picture}<p>{svg.escape(caption)}</p></div>')
    return f'<div class="scenes">{"".join(out)}</div>'
