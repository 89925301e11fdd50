"""The results folder: held by one workflow, swept of what was left, and ordered whatever the clock says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunelab.common.core import files
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import provenance, workspace

ROOT = Path(__file__).resolve().parents[3]


def test_a_folder_is_held_once_until_it_is_let_go(tmp_path):
    held = workspace.hold(tmp_path)
    with pytest.raises(PrunelabError, match=rf"process {os.getpid()} on .* is making the tables in {tmp_path}"):
        workspace.hold(tmp_path)
    held.close()
    workspace.hold(tmp_path).close()


def test_a_killed_holder_leaves_nothing_to_unlock(tmp_path):
    code = f"import time; from pathlib import Path; from prunelab.common.experiments import workspace; h = workspace.hold(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(600)"  # noqa: E501
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(PrunelabError, match=f"process {process.pid}"):
            workspace.hold(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    workspace.hold(tmp_path).close()


def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    names = {f".a.json.{process.pid}": True, f".b.json.{os.getpid()}": False, ".hidden": False, "c.json": False}
    (tmp_path / "records").mkdir()
    for name in names:
        (tmp_path / "records" / name).write_text("half")
    workspace.hold(tmp_path).close()
    assert {name: not (tmp_path / "records" / name).exists() for name in names} == names


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PrunelabError, match="cannot write"):
        workspace.hold(tmp_path / "file" / "results")
    with pytest.raises(PrunelabError, match="cannot write"):
        files.write_text(tmp_path / "file" / "x.json", "{}")


def test_times_of_the_future_are_brought_to_the_present_and_what_was_made_is_older(tmp_path):
    now = time.time()
    page, record, past = (tmp_path / name for name in ("page", "record", "past"))
    for path, moment in ((page, now + 900), (record, now + 300), (past, now - 300)):
        path.touch()
        os.utime(path, (moment, moment))
    workspace.settle([page, tmp_path / "none"], [record, past], now)
    assert page.stat().st_mtime < record.stat().st_mtime <= now
    assert past.stat().st_mtime == pytest.approx(now - 300)


def test_the_note_of_inputs_changes_with_content_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "ROOT", tmp_path)
    note, source = tmp_path / "results" / "made_from.json", tmp_path / "paper.yaml"
    source.write_text("a")

    def written(settings: dict[str, str], *records: str) -> bool:
        before = note.stat().st_mtime_ns if note.exists() else None
        provenance.file_hash.cache_clear()  # as in another process
        time.sleep(0.01)
        workspace.note_inputs(note, settings, [tmp_path / f"{name}.json" for name in records], [source, source])
        return note.stat().st_mtime_ns != before

    assert written({"scale": "smoke"}, "x")
    os.utime(source, (0, 0))
    assert not written({"scale": "smoke", "results": "elsewhere", "batch": "1"}, "x")
    assert written({"scale": "testbed"}, "x")
    assert written({"scale": "testbed"}, "x", "y")
    (note.parent / "records").mkdir()
    (note.parent / "records" / "x.json").touch()
    assert not written({"scale": "testbed"}, "x", "y"), "a record that is asked for is an input of its own"
    (note.parent / "records" / "z.json").touch()
    assert written({"scale": "testbed"}, "x", "y")
    source.write_text("b")
    assert written({"scale": "testbed"}, "x", "y")


def test_damaged_records_are_put_out_of_the_way(tmp_path):
    whole = tmp_path / "records" / f"{'0' * 20}-{'1' * 12}.json"
    provenance.write(whole, {"identity": "0" * 20, "sources": "1" * 12})
    damaged = whole.with_name("damaged.json")
    damaged.write_text("{")
    assert workspace.set_aside_damaged(tmp_path) == [damaged]
    assert whole.exists()
    assert damaged.with_suffix(".rejected").exists()
    assert workspace.set_aside_damaged(tmp_path / "none") == []
