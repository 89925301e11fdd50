"""Focus-DETR's own picture: the tokens that each encoder layer still updates on the testbed's scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunelab.common.drawing import sheets, svg
from prunelab.common.drawing.figures import Context, Figure


def figures(context: Context) -> list[Figure]:
    """The scenes, where their run has been made."""
    return context.drawn("tokens", "Tokens updated, layer by layer", lambda metrics: cascades(metrics["scenes"]))


def cascades(scenes: Mapping[str, Any]) -> str:
    """Each scene with the tokens of its finest level that every encoder layer updates, and what was found in it."""
    out = []
    for item in scenes["items"]:
        grid = (int(item["grids"][0][0]), int(item["grids"][0][1]))
        tokens = sum(height * width for height, width in item["grids"])
        kept = [
            (f"layer {site['layer']}: {sum(map(len, site['kept']))} of {tokens}", site["kept"][0])
            for site in item["sites"]
        ]
        right = sum(any(agree(box, other) for other in item["found"]) for box in item["annotated"])
        wrong = sum(not any(agree(box, other) for box in item["annotated"]) for other in item["found"])
        digits = ", ".join(str(box[0]) for box in item["annotated"]) or "no digit"
        caption = f"{digits}: {right} of {len(item['annotated'])} found, {wrong} boxes too many"
        picture = sheets.stages(item["image"], grid, kept, title=f"Scene with {caption}")
        out.append(f'<div class="scene">{picture}<p>{svg.escape(caption)}</p></div>')
    return f'<div class="scenes">{"".join(out)}</div>'


def agree(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes [label, score, x0, y0, x1, y1] have one label and overlap by more than half of their union."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (2, 3))
    if one[0] != other[0] or width <= 0 or height <= 0:
        return False
    both = width * height
    areas = [(box[4] - box[2]) * (box[5] - box[3]) for box in (one, other)]
    return both > 0.5 * (sum(areas) - both)
