"""Killed at random moments, the workflow goes on where it was: by the plain command, and to the same tables."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from tests.faults.workflow import Project, Workflow, assert_part, assert_unharmed, idle, records

KILLS = int(os.environ.get("KILLS", "50"))


def strike(workflow: Workflow, victim: str, lot: random.Random) -> bool:
    """Kill the whole group, as a loss of power does, the workflow alone, whose runs go on as orphans, or one process
    of the others, as the kernel does when memory is short. False where it was not there to be killed."""
    if workflow.process.poll() is not None:
        return False
    targets = {"group": [-workflow.process.pid], "workflow": [workflow.process.pid]}.get(victim) or workflow.members()
    if not targets:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(lot.choice(targets), signal.SIGKILL)
        return True
    return False


def test_killed_at_random_moments_it_resumes_to_the_same_tables(project, tmp_path):
    lot = random.Random(0)
    killed: Counter[str] = Counter()
    begun, rounds = time.monotonic(), 0
    undisturbed = tmp_path / "undisturbed"
    project.run(undisturbed)
    duration = time.monotonic() - begun  # of a run on this machine: moments are drawn from a little more
    while killed.total() < KILLS:
        results, rounds = tmp_path / str(rounds), rounds + 1
        stricken(project, results, undisturbed, killed, lot, duration)
        assert_unharmed(results, undisturbed)
        idle(project, results)
    print(f"{killed.total()} kills ({dict(killed)}) over {rounds} tables in {time.monotonic() - begun:.0f} s")
    assert set(killed) == {"group", "workflow", "process"} or KILLS < 20


def stricken(
    project: Project, results: Path, undisturbed: Path, killed: Counter[str], lot: random.Random, duration: float
) -> None:
    """Start until the tables are done, with a kill at a random moment of each start."""
    orphans: list[Workflow] = []
    kept: set[str] = set()
    done = False
    while not done:
        victim = lot.choices(["group", "workflow", "process"], [7, 2, 1])[0]
        start, delay = time.monotonic(), lot.uniform(0, duration)
        workflow = project.start(results)
        while time.monotonic() < start + delay and workflow.process.poll() is None:
            time.sleep(0.02)
        struck = killed.total() < KILLS and strike(workflow, victim, lot)
        killed[victim] += struck
        status = workflow.wait()
        done = status == 0
        orphans += [workflow] if struck and victim == "workflow" else []
        assert done or struck or orphans, workflow.output
        if results.exists():
            assert_part(results, undisturbed)
            now = set(records(results))
            assert now >= kept or orphans, "a record was lost"
            kept = now
    while any(orphan.members() for orphan in orphans):
        time.sleep(0.1)
