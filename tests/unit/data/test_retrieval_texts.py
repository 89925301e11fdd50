"""Texts that drafts are retrieved from."""

from __future__ import annotations

import json

import pytest

from prunelab.common.catalogue import hub
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import texts


def test_every_turn_of_a_dialogue_is_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "folder", lambda identity, kind, config: tmp_path)
    identity = {"loader": "ultrachat", "hub": "a/b"}
    with pytest.raises(PrunelabError, match="holds no JSON lines"):
        texts.load(identity, {}, "train")
    for name, turns in (("train_1.jsonl", [["c"], ["d", "e"]]), ("train_0.jsonl", [["a", "b"]])):
        (tmp_path / name).write_text("".join(json.dumps({"id": "0", "data": turn}) + "\n" for turn in turns))
    assert texts.load(identity, {}, "train") == ("a", "b", "c", "d", "e")
    with pytest.raises(PrunelabError, match="measure on another data set"):
        texts.load(identity, {}, "test")


def test_source_code_comes_in_as_many_files_as_asked_for():
    few, usual = (texts.load({"loader": "source_code", **more}, {}, "train") for more in ({"files": 3}, {}))
    assert len(few) == 3
    assert usual[:3] == few


def test_a_column_of_a_parquet_file_is_read_as_documents(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from prunelab.common.rehearsal import datasets

    datasets.parquet_texts(tmp_path / "a.parquet")
    monkeypatch.setattr(hub, "file", lambda identity, kind, config: tmp_path / "a.parquet")
    identity = {"loader": "parquet_texts", "hub": "a/b", "file": "a.parquet", "column": "content"}
    assert len(texts.load(identity, {}, "train")) == 20
    with pytest.raises(PrunelabError, match="no column text, but content"):
        texts.load({**identity, "column": "text"}, {}, "train")
    with pytest.raises(PrunelabError, match="measure on another data set"):
        texts.load(identity, {}, "test")
