"""Profiles: what they set is known, runs ask for the GPUs they take, and jobs of clusters stand by themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from prunelab.common.catalogue import lookup
from prunelab.common.cli import runs
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import planning, plans, runner
from prunelab.common.experiments.run import Run
from prunelab.common.models import devices

ROOT = Path(__file__).resolve().parents[3]
PROFILES = sorted(p.parent for p in (ROOT / "configs" / "profiles").glob("*/config.yaml"))


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_a_profile_sets_what_is_known(profile):
    files = read(profile / "config.yaml").get("configfile", [])
    assert bool(files) == (profile.name != "default")
    for file in files:
        settings = read(ROOT / file)
        assert Path(file).parent == profile.relative_to(ROOT)
        assert lookup.settings(settings)["scale"] == "paper"
        assert settings["gpu"] == 1
        assert profile.name == "gpu" or settings["batch"] == 1, "a cluster's job plans anew, when batches are others"


def test_every_profile_is_told_of():
    text = (ROOT / "configs" / "profiles" / "README.md").read_text()
    for profile in PROFILES:
        assert f"`{profile.name}`" in text
        for key in read(profile / "config.yaml"):
            if key.startswith(("slurm-", "default-storage")):
                assert key in text, f"{key} of {profile.name} is not explained"


def test_the_gpu_profile_plans_a_gpu_for_each_run_of_the_paper_scale(tmp_path, monkeypatch):
    """Latency rows need no checkpoint, and so are planned at once."""
    for name in [key for key in os.environ if key.startswith("PRUNELAB_")]:
        monkeypatch.delenv(name)
    plain = ["--workflow-profile", "none", "--profile", "configs/profiles/gpu"]  # without the progress bar
    command = [sys.executable, "-m", "snakemake", "records", "-n", *plain]
    done = subprocess.run(
        [*command, "--config", "papers=zero_tprune", "batch=1", f"results={tmp_path}"],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    settings = lookup.settings({"scale": "paper", "gpu": 1, "papers": "zero_tprune", "results": str(tmp_path)})
    runs = plans.made(settings).jobs().values()
    asked = re.findall(r"(?m)^ +resources: .*\bgpu=(\d)", done.stdout + done.stderr)
    assert any(run.task == "latency" for run in runs)
    assert asked.count("1") == sum(run.scale == "paper" for run in runs)
    assert asked.count("0") == sum(run.scale != "paper" for run in runs)


def test_runs_that_take_as_many_gpus_share_a_job(tmp_path):
    runs = {name: Run("perplexity", "paper", gpus=gpus) for name, gpus in {"a": 1, "b": 2, "c": 1}.items()}
    assert planning.batches(runs, tmp_path, 16) == [["a", "c"], ["b"]]


def test_the_catalogue_says_how_many_gpus_a_model_takes():
    for name, entry in lookup.models().items():
        gb, gpus = entry.get("paper", {}).get("gb", 0), entry.get("paper", {}).get("gpus", 1)
        assert gb <= 80 * gpus or name == "deepseek_r1", f"{gb} GB do not fit {gpus} GPUs of 80 GB"
    assert "gpus" in lookup.DESCRIPTIVE, "it is no part of a run's identity"


def test_the_workflow_s_command_claims_what_its_runs_take(tmp_path, monkeypatch):
    """Each record is made by one plain command, which takes its GPUs before the first run and fails in one line."""
    held = []
    jobs = {"a": Run("latency", "paper", gpus=2), "b": Run("latency", "paper")}
    monkeypatch.setattr(plans, "of", lambda config: SimpleNamespace(runs=jobs))
    monkeypatch.setattr(devices, "_smi", lambda *query: ["0, GPU-aa", "1, GPU-bb", "2, GPU-cc"])
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(runner, "execute", lambda run, config: held.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    runs.run_records(["a", "b"])
    assert held == ["GPU-aa,GPU-bb"] * 2
    monkeypatch.setattr(devices, "_smi", lambda *query: ["0, GPU-aa"])
    with pytest.raises(PrunelabError, match="takes 2 GPUs and 1 can be seen"):
        runs.run_records(["a"])
