"""`list` and `show`: what methods there are. Imports no torch."""

from __future__ import annotations

import re
import textwrap
from typing import Annotated

import typer
from rich.table import Table

from prunelab.common.cli.app import app, console
from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.options import words
from prunelab.common.experiments import listing, papers


@app.command("list")
def list_methods(
    pattern: Annotated[str, typer.Argument(help="of names, such as 'fast*'")] = "*",
    role: Annotated[str, typer.Option(help="only this role, such as token_pruner")] = "",
    family: Annotated[str, typer.Option(help="only papers of this family, such as vit")] = "",
    tag: Annotated[str, typer.Option(help="only papers with this taxonomy value, or axis=value")] = "",
) -> None:
    """List the methods, by name, role, family or taxonomy tag, one a line."""
    entries = listing.methods(pattern, role=role, family=family, tag=tag)
    if not entries:
        raise PrunelabError("no method matches; run `python -m prunelab list` for all of them")
    rows = []
    for entry in entries:
        paper = listing.paper(entry.slug)
        columns = (paper.family, f"{paper.title} ({paper.venue})") if paper else ("", "no paper.yaml yet")
        rows.append((entry.name, entry.role, *columns))
    rows.insert(0, ("method", "role", "family", "paper"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        line = "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
        console.print(line if len(line) <= console.width else line[: console.width - 1] + "…", markup=False)


@app.command()
def show(name: str) -> None:
    """Show one method: its paper, taxonomy, options with their defaults, and tables."""
    entry = registry.entry(name)
    paper = papers.load(entry.slug) if listing.paper(entry.slug) else None
    console.print(f"[bold]{name}[/bold]  {entry.role}")
    if paper:
        console.print(f"{paper.title}\n{', '.join(paper.authors)}, {paper.venue}", markup=False)
        console.print(f"status: {paper.status}", markup=False)
        for label, value in paper.links.items():
            console.print(f"{label}: {value}", markup=False)
        console.print(" ".join(f"{axis}={'/'.join(values)}" for axis, values in paper.taxonomy.items()), markup=False)
    console.print(f"\n{_filled(entry.doc, console.width)}", style="dim", markup=False)
    if entry.options:
        options = Table("option", "is", "default", title="options")
        for option in entry.options:
            options.add_row(option.name, words(option.hint), "required" if option.default is None else option.default)
        console.print(options)
    if paper and paper.tables:
        tables = Table("table", "reported numbers", title="tables")
        for table in paper.tables:
            tables.add_row(table.name, str(sum(r.table == table.name for r in papers.reported(paper.slug))))
        console.print(tables)


def _filled(doc: str, width: int) -> str:
    """A docstring in lines of that width: paragraphs are filled anew, names of parameters keep their lines."""
    results: list[str] = []
    before, _, parameters = doc.partition("Parameters\n----------\n")
    for paragraph in re.split(r"\n\s*\n", before.strip()):
        results += [textwrap.fill(" ".join(paragraph.split()), width), ""]
    if parameters:
        results += ["Parameters", "----------"]
        for name, indented in re.findall(r"^(\S.*)((?:\n[ \t]+\S.*)*)", parameters, re.MULTILINE):
            results += [
                name,
                textwrap.fill(" ".join(indented.split()), width, initial_indent="    ", subsequent_indent="    "),
            ]
    return "\n".join(results).rstrip()
