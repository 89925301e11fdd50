"""`train` and `prefetch`: what runs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunelab.common.cli.app import Settings, app, console, resumable, settings
from prunelab.common.core.errors import PrunelabError


@app.command()
def train(
    testbed: str,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for weights, log and checkpoint", show_default="results/training/TESTBED"),
    ] = None,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train a testbed model anew; resumes where an earlier start stopped."""
    from prunelab.common import testbeds
    from prunelab.common.training.trainer import fit

    made = testbeds.get(testbed)()  # type: ignore[call-arg]
    place = out or Path("results/training") / testbed
    with resumable(f"the training, from the last checkpoint that {place} has"):
        fit(made, place, seed, threads)


@app.command()
def prefetch(
    papers_: Annotated[str, typer.Option("--papers", help="slugs, such as wanda,flap; default: all")] = "",
    scale: Annotated[str, typer.Option(help="paper: from the hub; assets: check the assets folder")] = "paper",
    yes: Annotated[bool, typer.Option("--yes", help="start without asking")] = False,
    lock: Annotated[bool, typer.Option("--lock", help="ask the hub for what is not locked yet, and lock it")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="only tell what would be downloaded")] = False,
    config: Settings = None,
) -> None:
    """Download and check what the tables of some papers read, to run offline. Tells size and licences first."""
    from prunelab.common.catalogue import assets
    from prunelab.common.experiments import prefetch

    values = settings(config, **({"papers": papers_} if papers_ else {}))
    if scale == "assets":
        assets.verify(values, console)
    elif scale == "paper":
        prefetch.run(values, console, lock=lock, yes=yes, dry=dry)
    else:
        raise PrunelabError(f"nothing is prefetched at the scale '{scale}'; use paper or assets")
