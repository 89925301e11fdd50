"""Lines of a paper.yaml that messages name."""

from __future__ import annotations

from prunelab.common.experiments import lines

TEXT = """title: a paper
configurations:
  half: {method: tome}
tables:
  - name: T1
    columns: &scores
      top-1: {task: classify}
      top-5:
        task: classify
    rows: {half: half}
  - name: T2
    columns: *scores
    rows:
      half: half
"""


def test_a_path_of_keys_and_positions():
    assert lines.of_path(TEXT, ["title"]) == 1
    assert lines.of_path(TEXT, ["tables", 0, "columns", "top-5", "task"]) == 9
    assert lines.of_path(TEXT, ["tables", 1, "columns", "top-1"]) == 7, "where it is written"
    assert lines.of_path(TEXT, ["tables", 1, "absent", "more"]) == 11, "as far as it leads"
    assert lines.of_path(TEXT, ["absent", 0]) is None
    assert lines.of_path("a: [", ["a"]) is None


def test_names_are_found_inside_what_was_named_before_or_beside_it():
    assert lines.of_names(TEXT, "configurations", ["half"]) == 3
    assert lines.of_names(TEXT, "tables", ["T2"]) == 11
    assert lines.of_names(TEXT, "tables", ["T1", "half", "top-5"]) == 8
    assert lines.of_names(TEXT, "tables", ["T2", "half"]) == 14
    assert lines.of_names(TEXT, "tables", ["T2", "of a star", "top-5"]) == 8
    assert lines.of_names(TEXT, "tables", ["T3"]) == 4, "the section"
    assert lines.of_names(TEXT, "boards", ["b"]) is None
