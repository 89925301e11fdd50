"""One copy of the project and one run that nothing disturbs, for all faults."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.workflow import Project
from tests.workflow import generated


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Iterator[Project]:
    made = Project(generated.copy(tmp_path_factory.mktemp("project") / "prunelab"), tmp_path_factory.mktemp("logs"))
    yield made
    for workflow in made.started:
        workflow.kill()


@pytest.fixture(scope="session")
def undisturbed(project, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    project.run(results)
    return results


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
    """A copy of the finished results, to be harmed."""
    return Path(shutil.copytree(undisturbed, tmp_path / "finished results"))
