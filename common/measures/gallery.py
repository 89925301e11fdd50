"""Which tokens a method removes, stage by stage, on the testbed's own scenes.

Real images never enter a record: most data sets forbid passing them on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits, images
from prunelab.common.measures.bench import Bench
from prunelab.common.models import loading
from prunelab.common.tokens import match
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

if TYPE_CHECKING:
    from prunelab.common.tasks.gallery import Gallery


LOADER = "digit_scenes"


def measure(bench: Bench[Gallery.Settings]) -> dict[str, Any]:
    """What the task gives, see `tasks.gallery`."""
    if bench.ids["data"]["loader"] != LOADER:
        raise PrunelabError("a gallery shows the testbed's scenes alone; set `scales: [testbed]` in paper.yaml")
    method, count = bench.method(TokenPruner), bench.settings.samples
    if method is None:
        raise PrunelabError("a gallery shows what a method removes; name one under `configuration` in paper.yaml")
    model, transform = loading.load(bench.ids["model"], bench.config)
    x, labels = next(images.batches(bench.ids["data"], bench.config, transform, count, count))
    budget = match.match(method, model, bench.budget, x)
    with torch.inference_mode():
        dense = model(x).argmax(-1)
        with applied(method, model, budget, seed=bench.seed) as handle:
            pruned = model(x).argmax(-1)
            kept, info = handle.kept(), handle.adapter.info
    ink = ((x[:, 0] * digits.SCALE + digits.SHIFT).clamp(0, 1) * 255).round().int()

    items = [
        {
            "label": int(labels[i]),
            "dense": int(dense[i]),
            "pruned": int(pruned[i]),
            "image": [bytes(row).hex() for row in ink[i].tolist()],
            "sites": [
                {"layer": s.layer, "where": s.where, "kept": sorted(info.patches(places[i]).tolist())}
                for s, places in kept
            ],
        }
        for i in range(count)
    ]
    return {"scenes": {"value": count, "grid": list(info.grid or ()), "items": items}, "budget": {"text": str(budget)}}
