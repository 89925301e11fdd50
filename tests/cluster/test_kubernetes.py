"""The Kubernetes profile by dry run, and its storage for real: records reach a volume that no job writes to itself."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prunelab.common.catalogue import lookup
from prunelab.common.experiments import plans, provenance

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs")
SMALL = ["scale=smoke", "papers=lexrank", "batch=1"]

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(plugin) is None for plugin in PLUGINS),
    reason='no Kubernetes executor or storage plugin for Snakemake here (pip install -e ".[kubernetes]")',
)


def snakemake(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRUNELAB_")}
    command = [sys.executable, "-m", "snakemake", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False, timeout=1200)


def test_a_dry_run_plans_a_pod_for_every_record():
    image = ["--container-image", "registry.example/prunelab", "--kubernetes-persistent-volumes", "data:/prunelab"]
    done = snakemake("records", "-n", "--profile", "configs/profiles/kubernetes", *image, "--config", *SMALL)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    wanted = plans.made(lookup.settings({"scale": "smoke", "papers": "lexrank"})).jobs()
    assert re.search(rf"(?m)^ *record +{len(wanted)} *$", output), output


@pytest.mark.skipif(shutil.which("rsync") is None, reason="the storage plugin copies by rsync, which is not here")
def test_records_reach_the_storage(tmp_path):
    volume = ["--default-storage-provider", "fs", "--default-storage-prefix", str(tmp_path / "volume")]
    local = ["--local-storage-prefix", str(tmp_path / "local")]
    done = snakemake("records", "--cores", "2", *volume, *local, "--config", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    made = list((tmp_path / "volume" / "results" / "records").glob("*.json"))
    assert {p.stem for p in made} == set(plans.made(lookup.settings({"scale": "smoke", "papers": "lexrank"})).jobs())
    assert all(provenance.read(p)["metrics"] for p in made)
