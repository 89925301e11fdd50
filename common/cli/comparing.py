"""`board`: every method of a role on a model of one's own."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.table import Table

from prunelab.common.cli.app import Settings, app, console, settings
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import comparing, listing

ALIKE = 1.0  # percentage points: methods that save as much as another


@app.command()
def board(
    model: Annotated[Path, typer.Option(help="a folder of a language model in the hub's layout, or of a GGUF file")],
    role: Annotated[str, typer.Option(help=f"of the methods: {', '.join(comparing.ROLES)}")] = "weight_pruner",
    budget: Annotated[str, typer.Option(help="what each may keep, such as 0.5")] = "0.5",
    methods: Annotated[str, typer.Option(help="pattern of their names, such as 'sparse*'")] = "*",
    text: Annotated[str, typer.Option(help="a text file: its first half calibrates, its second half is read")] = "",
    samples: Annotated[int, typer.Option(help="sequences to measure on and to calibrate with", min=2)] = 12,
    length: Annotated[int, typer.Option(help="of the sequences in tokens", min=2)] = 256,
    out: Annotated[Path | None, typer.Option(help="CSV file for the results")] = None,
    config: Settings = None,
) -> None:
    """Compare all methods of a role on a language model of one's own, under one budget and on one text. Stopped by
    Ctrl-C, it shows what it has measured, and what it has not."""
    values = settings(config)
    question = comparing.Question(model, role, budget, text, samples, length)
    comparing.check(question)
    entries = listing.methods(methods, role=role)
    if not entries:
        raise PrunelabError(f"no {role} matches {methods}; run `python -m prunelab list --role {role}`")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    rich.reconfigure(quiet=True)  # one line tells of progress, and not one for every text of every method
    results: list[comparing.Result] = []
    with console.status("unpruned") as status, suppress(KeyboardInterrupt):  # what is there by then is shown
        for number, result in enumerate(comparing.compare(question, entries, values)):
            results.append(result)
            if out is not None:
                _write(out, results)
            following = entries[number].name if number < len(entries) else ""
            status.update(f"{number} of {len(entries)}: {following}")
            if following and not console.is_terminal:
                print(f"{number} of {len(entries)}: {following}", file=sys.stderr, flush=True)
    made = [r for r in results if r.value is not None]
    sign = -1 if question.higher_is_better else 1
    made.sort(key=lambda r: sign * (r.value or 0.0))
    what = "loss against unpruned" if question.metric == "perplexity" else "against unpruned"
    shown = Table("method", question.metric, what, "saved, %", box=None, pad_edge=False)
    for r in made:
        gap = "" if r.difference is None else f"{r.difference:+.3f} ± {r.interval:.3f}"
        shown.add_row(r.method, f"{r.value:.4g}", gap, "" if r.cost is None else f"{r.cost:.1f}")
    console.print(shown)
    refused = reasons(results)
    if refused:
        console.print(f"\n{sum(map(len, refused.values()))} methods were not measured:")
        for reason, names in refused.items():
            console.print(f"{', '.join(names)}: {reason}", markup=False, soft_wrap=True)
    saved = [r.cost for r in made if r.cost is not None and r.method != "unpruned"]
    if saved and max(saved) - min(saved) > ALIKE:
        console.print("\nThey save unlike amounts under this budget: compare the last column, too.")
    if left := [entry.name for entry in entries[max(len(results) - 1, 0) :]]:
        console.print(f"\nstopped; {len(left)} methods were not reached: {', '.join(left)}", soft_wrap=True)
        raise typer.Exit(130)


def reasons(results: list[comparing.Result]) -> dict[str, list[str]]:
    """Why methods have no value, each reason once, with the methods that it holds for; the most common one first."""
    groups: dict[str, list[str]] = {}
    for r in results:
        if r.refused:
            reason = r.refused.removeprefix(r.method).lstrip(": ")
            groups.setdefault(reason, []).append(r.method)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def _write(path: Path, results: list[comparing.Result]) -> None:
    import csv
    import io

    from prunelab.common.core.files import write_text

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(vars(results[0]))
    writer.writerows(["" if value is None else value for value in vars(r).values()] for r in results)
    write_text(path, buffer.getvalue())
