"""Which tokens a method removes, stage by stage, on the testbed's own scenes.

Real images never enter a record: most data sets forbid passing them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import digits, images
from prunelab.common.experiments.run import Run
from prunelab.common.models import loading
from prunelab.common.tokens import match
from prunelab.common.tokens.apply import applied
from prunelab.common.tokens.role import TokenPruner

LOADER = "digit_scenes"


def execute(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """Metric `scenes`: how many, the `grid` of patches, and in `items` for each scene its label, the dense and the
    pruned prediction, the image (a row of hexadecimal bytes a line, 255 is full ink), and the patches kept at each
    site."""
    if run.ids["data"]["loader"] != LOADER:
        raise PrunelabError("a gallery shows the testbed's scenes alone; set `scales: [testbed]` in paper.yaml")
    if run.method is None:
        raise PrunelabError("a gallery shows what a method removes; name one under `configuration` in paper.yaml")
    model, transform = loading.load(run.ids["model"], config)
    method = registry.create(run.method, **run.options)
    assert isinstance(method, TokenPruner)
    count, seed = int(run.settings["samples"]), int(run.settings.get("seed", 0))
    x, labels = next(images.batches(run.ids["data"], config, transform, count, count))
    budget = match.match(method, model, Budget.parse(str(run.budget)), x)
    with torch.inference_mode():
        dense = model(x).argmax(-1)
        with applied(method, model, budget, seed=seed) as handle:
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
