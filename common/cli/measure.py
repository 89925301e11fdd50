"""`cost` and `search`: what a method costs and saves, and which configuration does best at a cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from prunelab.common.catalogue import lookup
from prunelab.common.cli.app import Options, Settings, app, console, settings, short_lived
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget


@app.command()
def cost(
    method: str,
    model: Annotated[str, typer.Argument(help="a model of configs/models.yaml, or any timm ViT name")],
    budget: Annotated[str, typer.Argument(help="0.7 | 0.9,0.8,0.7 | 13removed | 64count")],
    options: Options = None,
) -> None:
    """Count what a method costs and saves on a model, on the meta device: no weights are needed."""
    entry, limit = registry.entry(method), Budget.parse(budget)  # their mistakes are told before libraries load

    with short_lived():
        import torch

        from prunelab.common.apply import apply
        from prunelab.common.models import loading

        chosen = registry.create(entry.name, **lookup.pairs(options or []))
        net = loading.architecture(loading.entry(model))
        with apply(chosen, net, limit) as handle, torch.no_grad():
            console.print(str(handle.report()))


@app.command()
def search(
    method: str,
    model: Annotated[str, typer.Argument(help="a model of configs/models.yaml, whose architecture sets the cost")],
    gflops: Annotated[float, typer.Argument(help="cost to meet, in G as the papers' counter has it")],
    trials: int = 24,
    samples: int = 300,
    seed: int = 0,
    data: str = "imagenet",
    out: Annotated[Path | None, typer.Option(help="JSON file for every trial")] = None,
    config: Settings = None,
) -> None:
    """Search configurations of a method that meet a cost, judged on the model and data of the chosen scale."""
    import json

    from prunelab.common.cli.search import monte_carlo
    from prunelab.common.core.files import write_text

    values = settings(config)
    trial_list = monte_carlo(method, model, gflops, trials, samples, seed, data, values)
    shown = Table("accuracy, %", "G", "configuration", "budget", title=f"best of {trials} configurations of {method}")
    for trial in trial_list[:10]:
        shown.add_row(f"{trial['accuracy']:.2f}", f"{trial['gflops']:.4f}", trial["method"], trial["budget"])
    console.print(shown)
    if out is not None:
        write_text(out, json.dumps(trial_list, indent=1) + "\n")
