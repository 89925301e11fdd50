"""A copy of the project with papers made for the purpose: how the workflow grows with the number of reported cells.

The papers are of the ordinary form, in `methods/generated_<n>/`. A hundred cells a paper; of every ten, six follow from
one count of MACs, two from one measurement, one needs a GPU and one a checkpoint that nobody has. Runs are shared by
two rows each, so that ten cells need one record. As a script (`python generated.py RESULTS`, working directory and
PYTHONPATH the copy) it writes those records, with invented metrics: what is measured is the workflow.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "Snakefile", "CITATION.cff", "common", "configs", "methods", "paper_tables", "profiles", "prunelab", "workflows",
)  # fmt: skip
CELLS, ROWS = 100, 10  # of a paper
COSTS = ("macs", "scoring", "dense", "saving", "fvcore", "blocks")
PAPER = """\
title: Generated paper {number}
authors: [Nobody]
venue: none
year: 2026
family: vit
taxonomy: {{target: [tokens]}}
status: made for a test of size
configurations:
  random: {{method: random_drop}}
tables:
  - name: main
    model: deit_small
    columns:
{columns}
    rows:
{rows}
"""


def copy(target: Path) -> Path:
    """What the workflow needs of the project, without history, results and tests."""
    target.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        if (ROOT / name).is_dir() and not (ROOT / name).is_symlink():
            shutil.copytree(
                ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "generated")
            )
        else:
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def generate(methods: Path, cells: int) -> None:
    """Papers with so many cells in all, instead of those that are there; the methods stay."""
    for path in methods.glob("*/paper.yaml"):
        path.unlink()
    columns = {name: f"{{task: macs, metric: {name}}}" for name in COSTS}
    columns |= {name: f"{{task: classify, data: imagenet, metric: {name}}}" for name in ("top1", "drop")}
    columns["speed"] = "{task: latency, metric: images_per_second, scales: [paper], settings: {batch: 64}}"
    columns["tuned"] = '{needs: {setting: "a checkpoint that nobody has"}}'
    for number in range(cells // CELLS):
        folder = methods / f"generated_{number:03d}"
        folder.mkdir()
        # Two rows a budget, and every budget is used once: the runs grow with the papers.
        shares = [0.1 + 0.8 * (number * ROWS // 2 + i // 2 + 1) / (cells // 10) for i in range(ROWS)]
        budgets = {f"row {i}": round(share, 6) for i, share in enumerate(shares)}
        text = PAPER.format(
            number=number,
            columns="\n".join(f"      {name}: {how}" for name, how in columns.items()),
            rows="\n".join(f"      {row}: {{configuration: random, budget: '{b}'}}" for row, b in budgets.items()),
        )
        (folder / "paper.yaml").write_text(text)
        lines = [f"main,{row},{column},1.5,G,page 1,primary\n" for row in budgets for column in columns]
        (folder / "reported.csv").write_text("".join(["table,row,column,value,unit,source,quality\n", *lines]))
        (folder / "README.md").write_text(f"# Generated paper {number}\n\nMade for a test of size.\n")
        (folder / "__init__.py").touch()


def write_records(results: Path) -> int:
    """Every record the generated papers ask for; how many there are."""
    from prunelab.common.catalogue import lookup
    from prunelab.common.experiments import plans, provenance

    runs = plans.made(lookup.settings({"results": str(results)})).jobs()
    for run in runs.values():
        names = COSTS if run.task == "macs" else ("top1", "drop", "gmacs", "saving")
        record = {
            "identity": run.identity,
            "sources": run.sources,
            "run": asdict(run),
            "metrics": {name: {"value": 1.5} for name in names},
            "environment": provenance.environment() | {"device": "none", "threads": 1, "dtype": "none"},
            "timing": {"started": 0, "seconds": 0.0},
        }
        provenance.write(run.path(results), record)
    return len(runs)


def snakemake(project: Path, results: Path, *arguments: str) -> tuple[str, float]:
    """Run the plain command in a copy, which must end well: what it prints, and the seconds of processor time it and
    its jobs take, which tell more than those of the wall on a busy machine."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRUNELAB_")} | {"PYTHONPATH": str(project)}
    command = [sys.executable, "-m", "snakemake", "paper_tables", "--cores", "1", "--config", f"results={results}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, *arguments], cwd=project, env=environment, text=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def finished(folder: Path, cells: int) -> tuple[Path, Path]:
    """A copy with so many cells whose records are there and whose page the workflow made: the copy, its results."""
    project, results = copy(folder / "prunelab"), folder / "results"
    generate(project / "methods", cells)
    environment = os.environ | {"PYTHONPATH": str(project)}
    subprocess.run([sys.executable, __file__, str(results)], cwd=project, env=environment, check=True)
    output, _ = snakemake(project, results)
    assert "records" not in output.partition("total")[0], "cells share runs, and what cannot run is no job"
    return project, results


if __name__ == "__main__":
    print(write_records(Path(sys.argv[1])))
