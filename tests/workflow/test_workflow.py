"""The whole workflow at smoke scale: complete, idle when warm, and unharmed by kills and tampering."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunelab.common.catalogue import lookup
from prunelab.common.experiments import plans

ROOT = Path(__file__).resolve().parents[2]


def start(results: Path, *extra: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "snakemake", "paper_tables", "--cores", "2"),
        *("--config", "scale=smoke", f"results={results}", *extra),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PRUNELAB_")}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def tables(results: Path) -> dict[str, bytes]:
    folder = results / "paper_tables"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed")
    output = finish(start(results))
    assert "index.html" in output, "the workflow says where the tables are"
    return results


def test_every_record_and_table_is_there(undisturbed):
    wanted = plans.made(lookup.settings({"scale": "smoke", "results": str(undisturbed)})).jobs()
    assert {p.stem for p in (undisturbed / "records").glob("*.json")} == set(wanted)
    made = tables(undisturbed)
    assert "index.html" in made
    assert any(name.endswith(".csv") for name in made)
    assert any(name.endswith(".md") for name in made)
    assert not list(undisturbed.rglob(".*")), "no half-written file is left"


def test_a_warm_start_runs_no_job(undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}
    assert "Nothing to be done" in finish(start(undisturbed))
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()} == before


def test_a_record_carries_how_it_was_made(undisturbed):
    for path in (undisturbed / "records").glob("*.json"):
        record = json.loads(path.read_text())
        environment = record["environment"]
        assert {"commit", "dirty", "libraries", "device", "dtype", "threads"} <= set(environment)
        assert record["run"]["task"]
        assert record["metrics"]


@pytest.mark.parametrize("harm", ["tampered", "truncated"])
def test_a_damaged_record_is_made_anew(undisturbed, harm):
    want = tables(undisturbed)
    path = next(p for p in sorted((undisturbed / "records").glob("*.json")) if "top1" in p.read_text())
    text = path.read_text()
    path.write_text(text.replace('"value": ', '"value": 1', 1) if harm == "tampered" else text[: len(text) // 2])
    output = finish(start(undisturbed))
    assert "damaged record" in output
    assert path.exists()
    assert tables(undisturbed) == want


def test_killed_in_the_middle_it_resumes_to_the_same_tables(undisturbed, tmp_path):
    process = start(tmp_path)
    deadline = time.time() + 120
    while not list((tmp_path / "records").glob("*.json")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    survivors = {p: p.stat().st_mtime_ns for p in (tmp_path / "records").glob("*.json")}
    assert survivors, "it was killed after its first record"
    assert not (tmp_path / "paper_tables" / "index.html").exists()
    finish(start(tmp_path))
    assert all(p.stat().st_mtime_ns == made for p, made in survivors.items()), "records are not made twice"
    assert tables(tmp_path) == tables(undisturbed)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("papers=zero_prune", "no paper 'zero_prune'"),
        ("assets=/nowhere", "assets folder /nowhere does not exist"),
        ("scale=huge", "no scale 'huge'"),
        ("colour=red", "no setting 'colour'"),
    ],
)
def test_a_mistake_is_one_line_before_work(tmp_path, extra, message):
    process = start(tmp_path, extra)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert message in output
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("*.json"))


def test_training_and_rehearsals_are_steps_of_their_own(tmp_path):
    """They can be asked for by result and by name, and the tables never start them."""
    wanted = str(tmp_path / "training" / "digits_vim_decay" / "training.json")
    for target, expected in ((wanted, ["training"]), ("rehearse", ["rehearse"]), ("paper_tables", [])):
        command = [sys.executable, "-m", "snakemake", "-n", target, "--config", f"results={tmp_path}", "scale=smoke"]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
        assert re.findall(r"(?m)^ *(training|rehearse) +1 *$", done.stdout + done.stderr)[:1] == expected
