"""`plan`, `run` and `replay`: the runs that the tables are made of."""

from __future__ import annotations

import json
import math
import re
import shlex
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from prunelab.common.cli.app import Settings, app, console, settings
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import forecast, overview, papers, planning, plans, provenance, schema
from prunelab.common.experiments.derived import FINITE, Derived
from prunelab.common.experiments.run import Run

REASONS = 12  # that `plan` shows unless it is asked for all


@app.command()
def plan(
    everything: Annotated[
        bool, typer.Option("--all", help="every reason, in full; of --gpu and --fit every number")
    ] = False,
    only: Annotated[str, typer.Option("--papers", help="of these alone, such as fastv,tome")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="how many numbers there are, how many a run can make, and why not the others")
    ] = False,
    gpu: Annotated[
        str, typer.Option(help=f"what the paper-scale runs take on such GPUs: {', '.join(forecast.GPUS)}")
    ] = "",
    fit: Annotated[str, typer.Option(help="which numbers can be made in such a time on one GPU: 48h, 2d")] = "",
    config: Settings = None,
) -> None:
    """Tell how many runs the tables need, how many are there, and what the other numbers lack. Runs nothing."""
    values = settings(config)
    if only:
        values["papers"] = only
    if gpu or fit:
        _tell_outlook(values, forecast.gpu(gpu or "h200"), _hours(fit) if fit else None, as_json, everything)
        return
    result = overview.overview(values)
    if as_json:
        summary = {
            "numbers": result.reported,
            "executable": result.executable,
            "assumed": result.assumed,
            "reasons": dict(result.reasons.most_common()),
        }
        print(json.dumps(summary, indent=1))
        return
    table = Table("runs", "scale", "needed", "there", box=None, pad_edge=False)
    for (kind, scale), (needed, there) in result.runs.items():
        table.add_row(kind, scale or "any", str(needed), str(there))
    totals = [sum(counts) for counts in zip(*result.runs.values(), strict=True)] or [0, 0]
    table.add_row("in all", "", *map(str, totals))
    console.print(table)
    console.print(f"\n{result.made} of {result.reported} reported numbers come from these runs")
    assumed = f", {result.assumed} of them under an assumption" if result.assumed else ""
    console.print(f"{result.executable} have a run, here or where its data and a GPU are{assumed}")
    if result.reasons:
        console.print(f"{result.reasons.total()} have none; they take")
        for reason, count in result.reasons.most_common():
            console.print(
                f"{count:5d}  {schema.REASONS.get(reason, 'a reason that paper.yaml does not say')}", markup=False
            )
    if result.lacking:
        shown = result.lacking.most_common(None if everything else REASONS)
        console.print(f"{result.lacking.total()} lack something; what most of them lack:")
        for reason, count in shown:
            line = f"{count:5d}  {reason}"
            told = textwrap.fill(line, console.width, subsequent_indent=7 * " ", break_on_hyphens=False)
            console.print(told, markup=False, soft_wrap=True)
        if len(shown) < len(result.lacking):
            console.print(f"and {len(result.lacking) - len(shown)} further reasons; --all shows all of them")
    if totals[1] < totals[0]:
        console.print("make the missing ones with: snakemake paper_tables")


def _hours(text: str) -> float:
    """A time such as `48h`, `90m` or `2d`, in hours."""
    result = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mhd])", text.strip().lower())
    if result is None:
        raise PrunelabError(f"'{text}' is no time; write it as 48h, 90m or 2d")
    return float(result[1]) * {"m": 1 / 60, "h": 1.0, "d": 24.0}[result[2]]


def _tell_outlook(values: dict[str, Any], card: forecast.Gpu, hours: float | None, as_json: bool, named: bool) -> None:
    """What waits for a GPU, by paper and in all; with `hours` what of it fits into them on one GPU. named: each number,
    too."""
    outlook = forecast.Outlook(plans.of(values), card)
    chosen = outlook.waiting if hours is None else outlook.fitting(hours)
    papers_in = dict.fromkeys(each.slug for each in chosen)
    lines = {slug: outlook.total([each.lacks for each in chosen if each.slug == slug]) for slug in papers_in}
    total = outlook.total([each.lacks for each in chosen])
    places = [(each.slug, each.number.table, each.number.row, each.number.column) for each in chosen]
    if as_json:
        print(json.dumps({"gpu": card.name, "papers": lines, "total": total, "cells": places}, indent=1))
        return
    if named:
        for slug, entry, row, column in places:
            shown = " ".join(shlex.quote(name) for name in (slug, entry, row))
            console.print(f"{shown} --column {shlex.quote(column)}", markup=False, soft_wrap=True)
    columns = ("paper", "numbers", "runs", "GPU hours", "GPUs", "GB each", "GB to download", "gated")
    table = Table(*columns, box=None, pad_edge=False)
    for name, line in [*lines.items(), ("in all", total)]:
        size = f"{line['download_gb']:,.0f}{'+' if line['download_unknown'] else ''}"
        time, memory = forecast.shown(line["gpu_hours"]), f"{line['memory_gb']:.0f}"
        figures = (line["numbers"], line["runs"], time, line["gpus"], memory, size, len(line["gated"]))
        table.add_row(name, *map(str, figures), end_section=name != "in all")
    console.print(table)
    notes = [
        f"\nforetold for {card.name} ({card.tflops:g} TFLOPS, {card.tbs:g} TB/s) from shapes, for unpruned models;"
        " '+' marks downloads of unknown size. In all, each run counts once."
    ]
    if total["hours_unknown"]:
        notes.append(f"{total['hours_unknown']} runs take hours that nothing tells")
    if total["gated"]:
        notes.append(f"gated: {', '.join(total['gated'])}")
    if lines:
        notes.append(f"download: python -m prunelab prefetch --lock --config papers={','.join(lines)}")
        single = "python -m prunelab run PAPER TABLE ROW --config scale=paper" + (
            "" if named else " (--all names them)"
        )
        notes.append(f"run: {forecast.command(lines) if hours is None else single}")
    for line_of_text in notes:
        console.print(line_of_text, markup=False, soft_wrap=True)


@app.command()
def run(
    paper: str,
    table: str,
    row: str,
    column: Annotated[str, typer.Option(help="only this column")] = "",
    config: Settings = None,
) -> None:
    """Run one row of a paper's table and print it beside what the paper reports."""
    from prunelab.common.experiments import runner

    values = settings(config)
    wanted = [
        c
        for c in planning.cells(paper, values)
        if c.reported.table == table and c.reported.row == row and column in ("", c.reported.column)
    ]
    if not wanted:
        papers.load(paper)
        known = sorted({(r.table, r.row) for r in papers.reported(paper)})
        tables = ", ".join(f"'{t}'" for t in dict.fromkeys(t for t, _ in known))
        rows = ", ".join(f"'{r}'" for t, r in known if t == table)
        raise PrunelabError(
            f"no reported row '{row}' in table '{table}' of {paper}; "
            + (f"rows: {rows}" if rows else f"tables: {tables}")
        )

    def made(job: Run, metric: str) -> tuple[float, float | None]:
        path = job.path(Path(values["results"]))
        provenance.reject_damaged(path)
        if not path.exists():
            runner.execute(job, values)
        result = provenance.read(path)["metrics"][metric]
        return result["value"], result.get("stderr")

    shown = Table("column", "reported", "scale", "value", "status")
    for cell in wanted:
        for scale, job in cell.runs.items():
            value, status = "", f"needs {job if isinstance(job, str) else job.needs}".removeprefix("needs nothing: ")
            if not isinstance(job, str) and not job.needs:
                found, error = job.value(made) if isinstance(job, Derived) else made(job, cell.metric)
                value = f"{found:g}" + (f" ± {error:g}" if error else "")
                status = cell.status if scale == "paper" else scale
                status = status if math.isfinite(found) else f"needs {FINITE}"
                status += f", under an assumption: {cell.assumes}" if cell.assumes else ""
            shown.add_row(
                cell.reported.column, f"{cell.reported.text} {cell.reported.unit}", scale if job else "", value, status
            )
    console.print(shown)


@app.command("run-records", hidden=True)
def run_records(addresses: list[str], config: Settings = None) -> None:
    """Make the records of these addresses (the workflow's entry point). One that fails does not stop the others."""
    import traceback

    from prunelab.common.experiments import runner
    from prunelab.common.models import devices

    values = settings(config)
    jobs = plans.of(values).runs
    failures: dict[str, list[str]] = {}  # what went wrong -> in which runs
    unknown = [address for address in addresses if address not in jobs]
    if unknown:
        failures["the sources changed meanwhile; start again"] = unknown
    wanted = [(address, jobs[address]) for address in addresses if address in jobs]
    with devices.claim(runner.gpus_needed([run for _, run in wanted])):
        for address, run in wanted:
            name = f"{address} ({run.method or 'unpruned'})"
            try:
                runner.execute(run, values)
            except PrunelabError as error:
                failures.setdefault(str(error), []).append(name)
            except Exception as error:  # a defect: its traceback is wanted, and so are the records of the others
                traceback.print_exc()
                failures.setdefault(f"{type(error).__name__}: {error}", []).append(name)
    if failures:
        raise PrunelabError("; ".join(f"run {', '.join(runs)}: {reason}" for reason, runs in failures.items()))


@app.command()
def replay(
    record: Annotated[Path, typer.Argument(help="a JSON file of results/records")],
    tolerance: Annotated[
        float, typer.Option(help="relative difference that passes where versions, machine or device are others")
    ] = 1e-3,
    force: Annotated[
        bool, typer.Option("--force", help="also where the sources are no longer those of the record")
    ] = False,
    config: Settings = None,
) -> None:
    """Run again exactly what a record tells of, and compare every metric; exit code 1 where one is off."""
    from prunelab.common.experiments import replay

    values = settings(config)
    if not replay.run(record, values, console, tolerance=tolerance, force=force):
        raise typer.Exit(1)
