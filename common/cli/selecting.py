"""`select`: training data from files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunelab.common.catalogue import lookup
from prunelab.common.cli.app import Options, app, console
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError


@app.command()
def select(
    method: str,
    raw: Annotated[Path, typer.Option(help="documents to choose from: .jsonl, .jsonl.gz, .jsonl.zst, .parquet")],
    keep: Annotated[str, typer.Option(help="how many to keep (1000), or which share (0.1)")],
    target: Annotated[list[Path] | None, typer.Option(help="documents that they should resemble; repeat")] = None,
    out: Annotated[Path, typer.Option(help="where the chosen lines go")] = Path("selected.jsonl"),
    field: Annotated[str, typer.Option(help="the field that holds the text")] = "text",
    options: Options = None,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="processes; the outcome does not depend on them")] = 1,
) -> None:
    """Choose training documents; goes on where an interrupted selection stopped."""
    from prunelab.common.core import registry
    from prunelab.common.data_selection import files
    from prunelab.common.data_selection.streaming import StreamSelector

    chooser = registry.create(method, **lookup.pairs(options or []))
    if not isinstance(chooser, StreamSelector):
        raise PrunelabError(
            f"{method} does not choose documents by their text alone; methods that read a model are used from Python"
            " (prunelab.common.data_selection.engine)"
        )
    budget = Budget.parse(f"{keep}count" if keep.isdigit() else keep)
    job = files.Job(chooser, raw, tuple(target or ()), out, budget, field, seed, workers)
    manifest = files.run(job)
    for line in files.summary(manifest):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"wrote {out} and {job.manifest.name}", soft_wrap=True)
