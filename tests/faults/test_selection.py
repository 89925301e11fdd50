"""A selection of training data, killed at random moments: started again it goes on, and gives the same documents."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

KILLS = int(os.environ.get("KILLS", "50")) // 5


def start(folder: Path, name: str, workers: int) -> subprocess.Popen[bytes]:
    """`select` in a process group of its own."""
    command = [
        sys.executable, "-m", "prunelab", "select", "dsir", "--raw", "raw.jsonl", "--target", "target.jsonl",
        "--keep", "400", "--out", f"{name}/out.jsonl", "--workers", str(workers), "--set", "min_length=5",
    ]  # fmt: skip
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def test_killed_at_random_moments_it_goes_on_to_the_same_documents(tmp_path):
    lot = random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    for name, documents in (("raw", 30_000), ("target", 300)):
        rows = (json.dumps({"text": " ".join(lot.choices(words, k=60))}) for _ in range(documents))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    begun = time.monotonic()
    assert start(tmp_path, "whole", 1).wait() == 0
    duration = time.monotonic() - begun
    expected = (tmp_path / "whole" / "out.jsonl").read_bytes()
    kills = rounds = 0
    while kills < KILLS:
        rounds += 1
        name = f"round{rounds}"
        process = start(tmp_path, name, 1)
        while True:
            try:
                status = process.wait(timeout=lot.uniform(0.3, 1.0) * duration)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                process = start(tmp_path, name, 1 + kills % 2)  # the number of processes may change on the way
                continue
            assert status == 0, (tmp_path / "log").read_text()
            break
        out = tmp_path / name
        assert (out / "out.jsonl").read_bytes() == expected
        assert sorted(path.name for path in out.iterdir()) == ["out.jsonl", "out.jsonl.manifest.json"]
    print(f"{kills} kills over {rounds} selections of {duration:.0f} s")
