"""`rehearse`: the paper scale on look-alikes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from prunelab.common.cli.app import Settings, app, console, resumable, settings
from prunelab.common.core.registry import choose
from prunelab.common.experiments import papers


@app.command()
def rehearse(
    only: Annotated[str, typer.Option("--papers", help="of these alone, such as fastv,tome")] = "",
    sample: Annotated[int | None, typer.Option(help="the first so many, which differ most", min=1)] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="where look-alikes are kept for the next time")
    ] = None,
    config: Settings = None,
) -> None:
    """Run every combination of task, model, method and data at paper scale once, offline, on look-alikes on the CPU."""
    from prunelab.common.rehearsal import rehearse as rehearsal

    values = settings(config)
    if only:
        for slug in only.split(","):
            choose(dict.fromkeys(papers.slugs()), slug.strip(), "paper")
        values["papers"] = only
    with tempfile.TemporaryDirectory() as temporary, resumable("what has not passed yet"):
        outcomes = rehearsal.run(values, folder or Path(temporary), sample=sample, console=console)
    for line in rehearsal.summary(outcomes):
        console.print(line, markup=False, soft_wrap=True)
    if any(outcome.fault and not outcome.skipped for outcome in outcomes):
        raise typer.Exit(1)
