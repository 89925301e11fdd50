"""`rehearse`: the paper scale on look-alikes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from prunelab.common.cli.app import Settings, app, console, settings


@app.command()
def rehearse(
    only: Annotated[str, typer.Option("--papers", help="of these alone, such as fastv,tome")] = "",
    sample: Annotated[int | None, typer.Option(help="the first so many, which differ most")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="where look-alikes are kept for the next time")
    ] = None,
    config: Settings = None,
) -> None:
    """Run every combination of task, model, method and data at paper scale once, offline, on look-alikes on the CPU."""
    from prunelab.common.rehearsal import rehearse as rehearsal

    values = settings(config)
    if only:
        values["papers"] = only
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = rehearsal.run(values, folder or Path(temporary), sample=sample, console=console)
    for line in rehearsal.summary(outcomes):
        console.print(line, markup=False, soft_wrap=True)
    if any(outcome.fault and not outcome.skipped for outcome in outcomes):
        raise typer.Exit(1)
