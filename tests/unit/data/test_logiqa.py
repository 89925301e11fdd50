"""LogiQA's questions, read of files like its authors'."""

from __future__ import annotations

import pytest

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import logiqa

BLOCK = "\n{label}\nAll cats sleep.Tom is a cat.\nWhat follows?\nA.Tom sleeps.\nB.Tom runs\nC.Tom eats\nD.Tom swims\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "Test.txt"


def test_questions_have_the_harness_s_columns(path):
    path.write_text(BLOCK.format(label="a") + BLOCK.format(label="d "))
    first, second = logiqa.rows(path)
    assert first == {
        "label": "a",
        "context": "All cats sleep. Tom is a cat.",
        "question": "What follows?",
        "options": ["Tom sleeps.", "Tom runs", "Tom eats", "Tom swims"],
    }
    assert second == {**first, "label": "d"}


@pytest.mark.parametrize("text", ["", BLOCK.format(label="e"), BLOCK.format(label="a") + "\nb\nA text\n"])
def test_other_files_are_refused(path, text):
    path.write_text(text)
    with pytest.raises(PrunelabError, match=r"question [12] is no letter"):
        logiqa.rows(path)


def test_a_missing_file_says_where_it_is_to_be_had(path):
    with pytest.raises(PrunelabError, match="fetch it from lgw863/LogiQA-dataset"):
        logiqa.rows(path)
