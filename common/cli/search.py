"""Monte-Carlo search for configurations of a method that meet a cost.

A paper's folder offers `search.py` with `propose(info, rng) -> (method, budget)` and `scale(budget, level) -> budget`.
Costs are those of the named architecture, on the meta device; accuracy is measured on the model and data that stand
for it at the chosen scale, every configuration on the same samples.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import track

from prunelab.common.apply import apply
from prunelab.common.catalogue import lookup
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs import meter
from prunelab.common.data import images
from prunelab.common.models import loading
from prunelab.common.tokens import match
from prunelab.common.tokens.adapters import adapter_for

TOLERANCE = 0.005  # of the cost


def monte_carlo(
    name: str,
    model_name: str,
    gflops: float,
    trials: int,
    samples: int,
    seed: int,
    data_name: str,
    config: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Every trial that met the cost, best accuracy first: accuracy in percent, gflops, method and budget as text."""
    folder = registry.slug(registry.get(name))
    try:
        space = importlib.import_module(f"prunelab.methods.{folder}.search")
    except ModuleNotFoundError:
        raise PrunelabError(
            f"{name} has no search space; add methods/{folder}/search.py with propose and scale"
        ) from None
    scale = "assets" if config["assets"] else config["scale"]
    model, data = (
        lookup.resolve("model", model_name, scale, config),
        lookup.resolve("dataset", data_name, scale, config),
    )
    if lacking := "; ".join(results.missing for results in (data, model) if results.missing):
        raise PrunelabError(f"this search needs {lacking}")
    net = loading.architecture(lookup.architecture(model_name))
    judge, transform = loading.load(model.identity, config)
    batches = list(images.batches(data.identity, config, transform, samples, 50))
    info, rng = adapter_for(net).info, random.Random(seed)

    def cost_at(method: Any, budget: Budget) -> float:
        with apply(method, net, budget) as handle:
            report = handle.report()
            return report.macs - report.scoring_macs + 5 * meter.norm_elements(net, handle.adapter.example())

    results = []
    for _ in track(range(trials), "searching", transient=True):
        method, start = space.propose(info, rng)
        budget = match.fit(lambda level: space.scale(start, level), lambda b: cost_at(method, b), gflops * 1e9)  # noqa: B023
        used = cost_at(method, budget) / 1e9
        if abs(used - gflops) > TOLERANCE * gflops:
            continue  # these layers cannot meet the cost
        with apply(method, judge, budget), torch.inference_mode():
            correct = torch.cat([judge(x).argmax(-1) == y for x, y in batches])
        results.append(
            {
                "accuracy": round(100 * correct.float().mean().item(), 3),
                "gflops": round(used, 4),
                "method": repr(method),
                "budget": str(budget),
                "samples": samples,
                "scale": scale,
            }
        )
    if not results:
        raise PrunelabError(f"no configuration met {gflops:g} G; ask for another cost or more trials")
    return sorted(results, key=lambda trial: -trial["accuracy"])
