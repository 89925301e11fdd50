"""The Slurm profile on a real Slurm of one node: the same tables as a local run, also when the node fails."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunelab.common.catalogue import lookup
from prunelab.common.experiments import plans
from tests.cluster.slurm import GPUS, Cluster, lacking

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1200  # seconds for the smallest tables on a busy machine

pytestmark = [
    pytest.mark.skipif(bool(lacking()), reason=f"no {', '.join(lacking())} here (Debian: slurm-wlm and munge)"),
    pytest.mark.skipif(
        importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
        reason='no Slurm executor for Snakemake here (pip install -e ".[slurm]")',
    ),
]


def snakemake(*options: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", *options]


def on_slurm(results: Path, *config: str, target: str = "paper_tables", retries: int = 1, share: int = 1) -> list[str]:
    """The documented command, with what a site adds: how jobs are looked up without accounts, small jobs, and how many
    records share one."""
    profile = ["--profile", "configs/profiles/slurm", "--slurm-status-command", "squeue", "--retries", str(retries)]
    size = ["--default-resources", "mem_mb=1000", "runtime=60"]
    groups = ["--groups", "record=few", "--group-components", f"few={share}"] if share > 1 else []
    return snakemake(target, *profile, *size, *groups, "--config", *config, f"results={results}")


def start(command: list[str], cluster: Cluster) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=cluster.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 0, output
    return output


def tables(results: Path) -> dict[str, bytes]:
    folder = results / "paper_tables"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def records(results: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in (results / "records").glob("*.json")}


def states(cluster: Cluster) -> list[str]:
    return cluster.query("squeue", "--states=all", "--noheader", "--format=%T").split()


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


SMOKE = ["scale=smoke", "gpu=1"]  # the profile says that there are GPUs, and so the tables do, for want of other things
SMALL = [*SMOKE, "papers=lexrank"]


def locally(results: Path, config: list[str]) -> Path:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRUNELAB_")}
    command = snakemake("paper_tables", "--cores", "2", "--config", *config, f"results={results}")
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return results


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return locally(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def test_the_tables_are_those_of_a_local_run(cluster, tmp_path):
    output = finish(start(on_slurm(tmp_path / "slurm", *SMOKE), cluster))
    assert "index.html" in output
    assert tables(tmp_path / "slurm") == tables(locally(tmp_path / "local", SMOKE))
    assert len(states(cluster)) == len(records(tmp_path / "slurm")) + 1, "a job for each record, and one for the page"
    assert set(states(cluster)) == {"COMPLETED"}


def test_a_run_at_paper_scale_is_given_a_gpu(cluster, tmp_path):
    """It then says that there is none, as the node's are a pretence; what Slurm was asked for is what counts."""
    settings = lookup.settings({"scale": "paper", "gpu": 1, "results": str(tmp_path), "papers": "zero_tprune"})
    run = next(run for run in plans.made(settings).jobs().values() if run.task == "latency")
    command = on_slurm(tmp_path, "papers=zero_tprune", target=str(run.path(tmp_path)), retries=0)
    process = start(command, cluster)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode != 0, output
    asked = cluster.query("squeue", "--states=all", "--noheader", "--Format=tres-per-job:40,tres-per-node:40")
    assert "gpu:1" in asked, asked
    log = (tmp_path / "logs" / f"{run.address}.log").read_text()
    assert "none is here" in log, log
    assert len(GPUS) > 1, "one of several is what a job gets"


def test_a_node_that_fails_and_returns_stops_nothing(cluster, small, tmp_path):
    """Snakemake stays: what the node was at is queued again, and the command comes to its end by itself."""
    process = start(on_slurm(tmp_path, *SMALL, share=4), cluster)
    wait_for(lambda: records(tmp_path), process)
    cluster.kill_node()
    survivors = records(tmp_path)
    wait_for(lambda: "down" in cluster.query("sinfo", "--noheader", "--format=%T"), process)
    cluster.start_node()
    finish(process)
    assert len(survivors) < len(records(tmp_path)), "it failed in the middle"
    assert tables(tmp_path) == tables(small)


def test_a_node_that_fails_with_snakemake_on_it_is_survived_by_a_restart(cluster, small, tmp_path):
    process = start(on_slurm(tmp_path, *SMALL, share=4), cluster)
    wait_for(lambda: records(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    cluster.kill_node()
    survivors = records(tmp_path)
    assert not (tmp_path / "paper_tables" / "index.html").exists()
    cluster.query("scancel", "--me")  # as the README says: jobs of a command that is gone are of no use
    cluster.start_node()
    finish(start(on_slurm(tmp_path, *SMALL, share=4), cluster))
    assert survivors.items() <= records(tmp_path).items(), "records are not made twice"
    assert tables(tmp_path) == tables(small)
