"""Questions with options about videos in a folder that a reader brings, and how VNBench scores their answers."""

from __future__ import annotations

import json

import pytest

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import video_questions
from prunelab.common.measures.lmms_tasks import vnbench

ORDERS = [["cat", "dog", "owl", "bee"], ["bee", "owl", "dog", "cat"]]


@pytest.fixture
def folder(tmp_path):
    asked = [
        {"video": f"VNBench_new/{name}.mp4", "question": "who?", "options": order, "gt": gt, "type": kind, "try": i}
        for name, gt, kind in (("a", "cat", "ret"), ("b", "owl", "ret"), ("c", "dog", "cnt"))
        for i, order in enumerate(ORDERS)
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "films").mkdir()
    for name in "abc":
        (tmp_path / "films" / f"{name}.mp4").touch()
    return tmp_path


def test_the_right_option_is_told_by_its_letter(folder):
    rows = video_questions.rows(folder, "films", "asked.json")
    assert [row["answer"] for row in rows] == ["A", "D", "C", "B", "B", "C"]
    assert rows[2]["video"] == str(folder / "films" / "b.mp4") and rows[2]["kind"] == "ret"
    text = vnbench.question(rows[1], {"post_prompt": "\nLetter."})
    assert text == "who?\nA. bee\nB. owl\nC. dog\nD. cat\nLetter."


def test_a_sample_counts_where_every_order_is_right_and_kinds_count_alike(folder):
    rows = video_questions.rows(folder, "films", "asked.json")

    def scored(*said):
        return vnbench.score([vnbench.process(r, [s])["vnbench_score"] for r, s in zip(rows, said, strict=True)])

    assert scored("A", "D.", "C. owl", "B", "B", "C") == 1
    assert scored("A", "D", "C", "A", "B", "C") == 0.75, "one of two of a kind, and the one of the other"
    assert scored("A", "D", "none", "x. B", "C", "B") == 0.25


def test_faults_of_the_folder_are_named(folder):
    (folder / "films" / "b.mp4").unlink()
    with pytest.raises(PrunelabError, match="no video b"):
        video_questions.rows(folder, "films", "asked.json")
    (folder / "asked.json").write_text(json.dumps([{"video": "a.mp4", "options": ["x"], "gt": "y", "type": "t"}]))
    with pytest.raises(PrunelabError, match="none of its options"):
        video_questions.rows(folder, "films", "asked.json")
