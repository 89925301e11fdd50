"""A disk that fills up or cannot be written: nothing half-written, and with room again the plain command goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.workflow import Project, assert_part, assert_unharmed, idle, records
from tests.workflow import generated

SIZE = 96 << 20  # bytes of the disk: the copied project and its results take less


def mounted(folder: Path, *options: str) -> None:
    """Mount at a folder, or skip the test where that takes more rights."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting takes rights that are missing here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    mounted(folder, "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, room: int) -> Path:
    """Fill the disk up to some room, in bytes; the file that takes the rest."""
    free = shutil.disk_usage(folder).free - room
    filler = folder / "filler"
    filler.write_bytes(b"\0" * max(free, 0))
    return filler


def test_on_a_full_disk_nothing_is_half_written_and_with_room_it_goes_on(disk, undisturbed, tmp_path):
    """The project lies on the disk, too, so that Snakemake's own notes find no room either."""
    project = Project(generated.copy(disk / "prunelab"), tmp_path / "logs")
    results = disk / "results"
    made = sum(p.stat().st_size for p in (undisturbed / "records").iterdir())
    seen = []
    for room in (0, made // 2, made + (1 << 20) // 4):
        filler = fill(disk, room)
        workflow = project.start(results)
        assert workflow.wait() != 0, "there was room for everything"
        assert "No space left" in workflow.output
        if results.exists():
            assert_part(results, undisturbed)
        assert not (results / "paper_tables" / "index.html").exists(), "the page comes last"
        seen.append(len(records(results)))
        filler.unlink()
    assert seen[0] == 0 < seen[-1], seen
    project.run(results)
    assert_unharmed(results, undisturbed)
    idle(project, results)


def test_a_full_disk_is_told_in_one_line_before_work(disk, project):
    fill(disk, 0)
    output = project.fails(disk / "results")
    assert "error: cannot write" in output
    assert "No space left" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("state", ["new", "unfinished"])
def test_a_read_only_results_folder_is_told_in_one_line_before_work(project, undisturbed, tmp_path, state):
    results = tmp_path / "results"
    if state == "unfinished":
        shutil.copytree(undisturbed, results)
        next((results / "records").glob("*.json")).unlink()
    else:
        results.mkdir()
    mounted(results, "--bind", str(results))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(results)], check=True)
        before = sorted(results.iterdir())
        output = project.fails(results)
        assert "error: cannot write" in output
        assert "read-only" in output.lower()
        assert "Traceback" not in output
        assert sorted(results.iterdir()) == before
    finally:
        subprocess.run(["umount", "--lazy", str(results)], check=True)
    project.run(results)
    assert_unharmed(results, undisturbed)
