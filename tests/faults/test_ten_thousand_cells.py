"""Ten thousand cells: a start that finds nothing to do takes seconds, and a time linear in the cells."""

from __future__ import annotations

import time

from tests.workflow import generated

LIMIT = 30  # seconds, on an idle machine; processor time is held to it, which another's load does not lengthen
SIZES = (1000, 4000, 10000)


def test_a_start_with_nothing_to_do_is_short_and_linear_in_the_cells(tmp_path):
    seconds = []
    for cells in SIZES:
        project, results = generated.finished(tmp_path / str(cells), cells)
        begun = time.monotonic()
        taken = []
        for _ in range(3):
            output, processor = generated.snakemake(project, results)
            assert "Nothing to be done" in output
            taken.append(processor)
        wall = (time.monotonic() - begun) / 3
        seconds.append(min(taken))
        print(f"{cells} cells: {seconds[-1]:.2f} s of processor time, {wall:.2f} s")
    few, some, many = seconds
    assert many < LIMIT
    slopes = [(some - few) / (SIZES[1] - SIZES[0]), (many - some) / (SIZES[2] - SIZES[1])]
    assert slopes[1] < 2 * max(slopes[0], 1e-4), f"{slopes} seconds a cell"
