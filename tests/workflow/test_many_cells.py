"""A thousand cells: a start that finds nothing to do stays short. Ten thousand: `make test-faults`."""

from __future__ import annotations

import csv

from tests.workflow import generated

CELLS = 1000
LIMIT = 15  # seconds of processor time; it takes 2 to 3


def test_a_start_with_nothing_to_do_is_short(tmp_path):
    project, results = generated.finished(tmp_path, CELLS)
    assert len(list((results / "records").glob("*.json"))) == CELLS // 10
    shown = [path for path in (results / "paper_tables").rglob("*.csv") if path.stem == "main"]
    assert sum(len(list(csv.DictReader(path.open()))) for path in shown) == CELLS, "every cell is in a table"
    output, seconds = generated.snakemake(project, results)
    assert "Nothing to be done" in output
    assert seconds < LIMIT
