"""Run the workflow at smoke scale from a copy of the project, and tell whether it came through unharmed.

The copy has its own `.snakemake`, sources and weights, which faults may damage. Output goes to a file, as orphans of a
killed workflow would keep a pipe open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunelab.common.experiments import provenance

LIMIT = 1800  # seconds for one run, on a machine that is busy with other things
PAPERS = os.environ.get("PAPERS", "all")  # on a busy machine `PAPERS=lexrank` takes a third of the time


@dataclass
class Workflow:
    """A started `snakemake paper_tables` in a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        return self.process.wait(timeout=LIMIT)

    def members(self) -> list[int]:
        """The other living processes of its group: shells, runs, the page."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                with contextlib.suppress(OSError):
                    status = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(status[2]) == self.process.pid and status[0] != "Z":
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """SIGKILL to the whole group, orphans included, and wait until they are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Project:
    """A copy of the project and the runs started in it."""

    folder: Path
    logs: Path
    started: list[Workflow] = field(default_factory=list)

    def start(self, results: Path, *extra: str, target: str = "paper_tables") -> Workflow:
        """Start the plain command; `extra` are further settings."""
        self.logs.mkdir(exist_ok=True)
        log = self.logs / f"{len(self.started)}.log"
        command = [
            *(sys.executable, "-m", "snakemake", target, "--cores", "2"),
            *("--config", "scale=smoke", f"papers={PAPERS}", f"results={results}", *extra),
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PRUNELAB_")}
        environment["PYTHONPATH"] = str(self.folder)  # before the checkout that the environment was installed from
        environment["COLUMNS"] = "1000"  # so that no message is broken into lines
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(Workflow(process, log))
        return self.started[-1]

    def run(self, results: Path, *extra: str) -> str:
        """Run to the end, which must be a good one; what it printed."""
        workflow = self.start(results, *extra)
        assert workflow.wait() == 0, workflow.output
        return workflow.output

    def fails(self, results: Path, *extra: str) -> str:
        """Run to the end, which must be a bad one; what it printed, in one line."""
        workflow = self.start(results, *extra)
        assert workflow.wait() != 0, workflow.output
        return " ".join(workflow.output.split())


def tables(results: Path) -> dict[str, bytes]:
    """Every file of the tables."""
    folder = results / "paper_tables"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def records(results: Path) -> dict[str, Any]:
    """Every record without its time stamps; raises where one is not whole."""
    found = {}
    for path in sorted((results / "records").glob("*.json")):
        record = provenance.read(path)
        found[path.name] = {key: record[key] for key in ("identity", "sources", "run", "metrics")}
    return found


def assert_unharmed(results: Path, undisturbed: Path) -> None:
    """The same records and tables as of a run that nothing disturbed, and nothing half-written beside them."""
    assert records(results) == records(undisturbed)
    made, wanted = tables(results), tables(undisturbed)
    assert made.keys() == wanted.keys()
    assert [name for name in wanted if made[name] != wanted[name]] == []
    assert [str(p) for p in results.rglob(".*")] == [], "no half-written file is left"


def assert_part(results: Path, undisturbed: Path) -> None:
    """Each record that is there is whole and as it should be."""
    made, wanted = records(results), records(undisturbed)
    assert [name for name in made if made[name] != wanted.get(name)] == []


def idle(project: Project, results: Path) -> None:
    """A further start finds nothing to do."""
    assert "Nothing to be done" in project.run(results)
