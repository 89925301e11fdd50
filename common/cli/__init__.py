"""`python -m prunelab ...`: list, show, cost, apply, run one table row, train a testbed."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import papers, planning
from prunelab.common.experiments.run import Run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Options = Annotated[list[str] | None, typer.Option("--set", help="hyper-parameter, key=value; repeat for more")]
Settings = Annotated[list[str] | None, typer.Option("--config", help="setting of configs/default.yaml, key=value")]


@app.command("list")
def list_methods(
    role: Annotated[str, typer.Option(help="only this role, such as token_pruner")] = "",
    family: Annotated[str, typer.Option(help="only papers of this family, such as vit")] = "",
    tag: Annotated[str, typer.Option(help="only papers with this taxonomy value, or axis=value")] = "",
) -> None:
    """List the methods, by role, family or taxonomy tag."""
    from prunelab.common.core import registry

    table = Table("method", "role", "family", "paper", "taxonomy")
    shown = 0
    for name, cls in registry.load().items():
        paper = papers.load(registry.slug(cls))
        axis, sign, value = tag.partition("=")
        tags = paper.taxonomy.get(axis, []) if sign else [v for values in paper.taxonomy.values() for v in values]
        if (
            (role and cls.role != role)
            or (family and paper.family != family)
            or (tag and (value if sign else tag) not in tags)
        ):
            continue
        taxonomy = " ".join(f"{a}={'/'.join(v)}" for a, v in paper.taxonomy.items())
        table.add_row(name, cls.role, paper.family, f"{paper.title} ({paper.venue})", taxonomy)
        shown += 1
    if not shown:
        raise PrunelabError("no method matches; run `python -m prunelab list` for all of them")
    console.print(table)


@app.command()
def show(name: str) -> None:
    """Show one method: its paper, defaults and tables."""
    from prunelab.common.core import registry

    cls = registry.get(name)
    paper = papers.load(registry.slug(cls))
    console.print(f"[bold]{name}[/bold]  {cls.role}\n{paper.title}\n{', '.join(paper.authors)}, {paper.venue}")
    console.print(f"status: {paper.status}")
    for label, link in paper.links.items():
        console.print(f"{label}: {link}")
    console.print((cls.__doc__ or "").strip(), style="dim")
    defaults = Table("option", "default", title="defaults")
    for f in fields(cls):  # type: ignore[arg-type]
        defaults.add_row(f.name, "required" if f.default is MISSING else repr(f.default))
    console.print(defaults)
    tables = Table("table", "reported numbers", title="tables")
    for table in paper.tables:
        tables.add_row(table.name, str(sum(r.table == table.name for r in papers.reported(paper.slug))))
    console.print(tables)


@app.command()
def cost(
    method: str,
    model: Annotated[str, typer.Argument(help="a model of configs/loading.yaml, or any timm ViT name")],
    budget: Annotated[str, typer.Argument(help="0.7 | 0.9,0.8,0.7 | 13removed | 64count")],
    options: Options = None,
) -> None:
    """Count what a method costs and saves on a model, on the meta device: no weights are needed."""
    import torch

    from prunelab.common.apply import apply
    from prunelab.common.core import registry
    from prunelab.common.core.budget import Budget
    from prunelab.common.models import loading

    net = loading.architecture(loading.entry(model))
    with (
        apply(registry.create(method, **lookup.pairs(options or [])), net, Budget.parse(budget)) as handle,
        torch.no_grad(),
    ):
        console.print(str(handle.report()), highlight=False)


@app.command()
def apply(
    method: str,
    file: Annotated[Path, typer.Argument(help="an image, a video (MP4, WebM, GIF ...) or a text file of your own")],
    budget: Annotated[
        str, typer.Argument(help="0.7 or 0.9,0.8,0.7 for an image; 3count, 100words or 665bytes for a text")
    ],
    out: Annotated[Path | None, typer.Option(help="where the picture goes; default: beside the file")] = None,
    model: Annotated[
        str, typer.Option(help="a testbed, an assets checkpoint, a timm model, or a folder in the hub's layout")
    ] = "digits_vit",
    question: Annotated[str, typer.Option(help="what to ask an image or video language model")] = "",
    frames: Annotated[int, typer.Option(help="taken of a video, at even distances")] = 16,
    weights: Annotated[Path | None, typer.Option(help="safetensors file for the model")] = None,
    options: Options = None,
    config: Settings = None,
) -> None:
    """Apply a method to an image, a video or a text of your own and see what it keeps."""
    from prunelab.common.cli import demo

    values = lookup.settings(lookup.pairs(config or []))
    demo.run(method, file, budget, out, model, weights, question, frames, lookup.pairs(options or []), values, console)


@app.command()
def run(
    paper: str,
    table: str,
    row: str,
    column: Annotated[str, typer.Option(help="only this column")] = "",
    config: Settings = None,
) -> None:
    """Run one row of a paper's table and print it beside what the paper reports."""
    from prunelab.common.experiments import provenance, runner

    values = lookup.settings(lookup.pairs(config or []))
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
    shown = Table("column", "reported", "scale", "value", "status")
    for cell in wanted:
        for scale, job in cell.runs.items():
            value, status = "", f"needs {job if isinstance(job, str) else job.needs}"
            if isinstance(job, Run) and not job.needs:
                path = job.path(Path(values["results"]))
                provenance.reject_damaged(path)
                if not path.exists():
                    runner.execute(job, values)
                metric = provenance.read(path)["metrics"][cell.metric]
                value = f"{metric['value']:g}" + (f" ± {metric['stderr']:g}" if metric.get("stderr") else "")
                status = cell.status if scale == "paper" else scale
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

    values = lookup.settings(lookup.pairs(config or []))
    jobs = planning.jobs(values)
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
def search(
    method: str,
    model: Annotated[str, typer.Argument(help="a model of configs/loading.yaml, whose architecture sets the cost")],
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

    values = lookup.settings(lookup.pairs(config or []))
    trial_list = monte_carlo(method, model, gflops, trials, samples, seed, data, values)
    shown = Table("accuracy, %", "G", "configuration", "budget", title=f"best of {trials} configurations of {method}")
    for trial in trial_list[:10]:
        shown.add_row(f"{trial['accuracy']:.2f}", f"{trial['gflops']:.4f}", trial["method"], trial["budget"])
    console.print(shown)
    if out is not None:
        write_text(out, json.dumps(trial_list, indent=1) + "\n")


@app.command()
def train(
    testbed: str,
    out: Annotated[Path, typer.Option(help="folder for weights, log and checkpoint")] = Path("results/training"),
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train a testbed model anew; resumes where an earlier start stopped."""
    from prunelab.common import testbeds
    from prunelab.common.training.trainer import fit

    fit(testbeds.get(testbed)(), out, seed, threads)  # type: ignore[call-arg]


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

    given = {"papers": papers_} if papers_ else {}
    values = lookup.settings({**lookup.pairs(config or []), **given})
    if scale == "assets":
        assets.verify(values, console)
    elif scale == "paper":
        prefetch.run(values, console, lock=lock, yes=yes, dry=dry)
    else:
        raise PrunelabError(f"nothing is prefetched at the scale '{scale}'; use paper or assets")


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

    values = lookup.settings(lookup.pairs(config or []))
    if not replay.run(record, values, console, tolerance=tolerance, force=force):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a mistake in the input is one line and exit code 2, never a traceback."""
    try:
        if code := app(standalone_mode=False):  # of a typer.Exit; commands themselves return nothing
            sys.exit(code)
    except PrunelabError as error:
        sys.exit(_complain(error))
    except (typer.Exit, typer.Abort) as stop:
        sys.exit(getattr(stop, "exit_code", 1))
    except Exception as error:
        if not type(error).__module__.startswith(("click", "typer")):
            raise  # a defect of ours: the traceback is wanted
        sys.exit(_complain(error.format_message() if hasattr(error, "format_message") else error))


def _complain(error: object) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
