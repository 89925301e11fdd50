"""Clocks that jump, and two workflows at once in one results folder."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from tests.faults.workflow import Project, assert_unharmed, idle, tables
from tests.workflow import generated

YEAR = 365 * 86400


@pytest.mark.parametrize("harmed", ["records", "page", "all"])
@pytest.mark.parametrize("years", [5, -20])
def test_files_of_another_time_change_nothing(project, undisturbed, finished, harmed, years):
    """As after a clock that was ahead, or that began in the past."""
    what = {"records": "records/*.json", "page": "paper_tables/index.html", "all": "**/*"}[harmed]
    moment = time.time() + years * YEAR
    for path in finished.glob(what):
        os.utime(path, (moment, moment))
    next((finished / "records").glob("*.json")).unlink()  # so that the page is made anew from records of the future
    project.run(finished)
    assert_unharmed(finished, undisturbed)
    idle(project, finished)


@pytest.mark.parametrize("years", [5, -20])
def test_an_edit_counts_whatever_its_time(undisturbed, finished, tmp_path, years):
    """Time stamps of sources say nothing: the page is made anew where their content changed, and only there."""
    project = Project(generated.copy(tmp_path / "prunelab"), tmp_path / "logs")
    paper = project.folder / "methods" / "lexrank" / "paper.yaml"
    moment = time.time() + years * YEAR
    text = paper.read_text()
    paper.write_text(text.replace("status:", "status: 'edited just now' #", 1))
    os.utime(paper, (moment, moment))
    project.run(finished)
    assert any(b"edited just now" in content for content in tables(finished).values())
    idle(project, finished)
    paper.write_text(text)
    os.utime(paper, (moment, moment))
    project.run(finished)
    assert_unharmed(finished, undisturbed)


def test_sources_of_the_future_start_nothing(finished, tmp_path):
    """As of a checkout made while the clock was ahead."""
    project = Project(generated.copy(tmp_path / "prunelab"), tmp_path / "logs")
    moment = time.time() + YEAR
    for path in project.folder.rglob("*"):
        os.utime(path, (moment, moment))
    idle(project, finished)


def test_of_two_at_once_one_works_and_the_other_says_so(project, undisturbed, tmp_path):
    results = tmp_path / "results"
    pair = [project.start(results), project.start(results)]
    status = [workflow.wait() for workflow in pair]
    assert sorted(map(bool, status)) == [False, True], [workflow.output for workflow in pair]
    loser = " ".join(pair[status.index(0) - 1].output.split())
    assert "is making the tables in" in loser
    assert "wait until it is done" in loser
    assert "Traceback" not in loser
    assert_unharmed(results, undisturbed)
    idle(project, results)


def test_different_folders_are_made_side_by_side(project, undisturbed, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    pair = [project.start(results) for results in folders]
    for workflow, results in zip(pair, folders):
        assert workflow.wait() == 0, workflow.output
        assert_unharmed(results, undisturbed)


def test_a_finished_folder_can_be_read_while_another_holds_it(project, finished):
    """Nothing to do asks for no lock."""
    from prunelab.common.experiments import workspace

    with workspace.hold(finished):
        idle(project, finished)
    shutil.rmtree(finished / "paper_tables")
    with workspace.hold(finished):
        assert "is making the tables in" in project.fails(finished)
    project.run(finished)
