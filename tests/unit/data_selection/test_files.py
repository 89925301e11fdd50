"""Selections from files: as in memory, however many processes, after an interruption, and of every format."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from prunelab.common.cli import main
from prunelab.common.core import optional
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection import files, streaming
from prunelab.common.data_selection.engine import select
from prunelab.common.data_selection.examples import JsonLines, corpus
from prunelab.methods.dsir.method import DSIR

METHOD = DSIR(min_length=4, buckets=500, fitted=900)
TEXTS = [f"{a} {b} number {i} ran over the {c} hill" for i in range(10) for a, b, c in
         (("red", "fox", "old"), ("blue", "whale", "wet"), ("grey", "goose", "far"))]  # fmt: skip
TARGET = ["the blue whale swam over the wet hill", "a blue whale"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for module in (streaming, files):
        monkeypatch.setattr(module, "CHUNK", 4)
    for name, texts in (("raw", TEXTS), ("target", TARGET)):
        rows = [json.dumps({"text": text, "id": number}) for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))  # no line break at the end
    return tmp_path


def job(folder: Path, **changes) -> files.Job:
    values = {"budget": Budget(7, "count"), "raw": folder / "raw.jsonl", "out": folder / "out" / "chosen.jsonl"}
    return files.Job(METHOD, targets=(folder / "target.jsonl",), **(values | changes))


def lines(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_files_give_what_memory_gives(folder):
    given = job(folder, seed=3)
    manifest = files.run(given, progress=False)
    expected = select(METHOD, JsonLines(given.raw), given.budget, target=TARGET, seed=3)
    assert lines(given.out) == [row["text"] for row in expected] and len(lines(given.out)) == 7
    assert manifest == json.loads(given.manifest.read_text()) and not given.work.exists()
    assert manifest["out"]["documents"] == 7 and manifest["raw"]["documents"] == 30
    before, after = manifest["statistics"].values()
    assert after < before
    told = "\n".join(files.summary(manifest))
    assert "kept 7 of 30" in told and "blue whale" in told and "dropped, the last" in told
    assert files.run(given, progress=False) == manifest, "again the same"


def test_the_outcome_does_not_depend_on_the_number_of_processes(folder):
    one, two = job(folder), job(folder, out=folder / "two.jsonl", workers=2)
    first, second = files.run(one, progress=False), files.run(two, progress=False)
    assert one.out.read_bytes() == two.out.read_bytes() and first["samples"] == second["samples"]


@pytest.mark.parametrize("stop", [3, 7, 9, 12, 15])
def test_an_interrupted_selection_goes_on_and_gives_the_same(folder, monkeypatch, stop):
    whole = job(folder, out=folder / "whole.jsonl")
    files.run(whole, progress=False)
    monkeypatch.setattr(files, "SAVED", 2)
    calls = 0
    read = DSIR.read

    def interrupted(self, texts):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return read(self, texts)

    monkeypatch.setattr(DSIR, "read", interrupted)
    given = job(folder)
    with pytest.raises(KeyboardInterrupt):
        files.run(given, progress=False)
    assert given.work.exists() and not given.out.exists()
    before, stop = calls, -1
    files.run(given, progress=False)
    assert given.out.read_bytes() == whole.out.read_bytes()
    assert calls - before < 2 + 8 + 1 + 8 + 2, "what was done is not done again" if before > 4 else ""
    (folder / "raw.jsonl").write_text(json.dumps({"text": TARGET[0]}) + "\n" + (folder / "raw.jsonl").read_text())
    assert files.run(given, progress=False)["raw"]["documents"] == 31, "another file is another selection"


def test_compressed_lines_are_read(folder):
    plain = (folder / "raw.jsonl").read_bytes()
    (folder / "raw.jsonl.gz").write_bytes(gzip.compress(plain))
    assert list(corpus(folder / "raw.jsonl.gz")) == TEXTS
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(plain)[:-12])
    with pytest.raises(PrunelabError, match="cannot read"):
        list(corpus(folder / "cut.jsonl.gz"))


def test_formats_of_other_libraries(folder, monkeypatch):
    """Stands in for the libraries, which are not among the requirements."""

    class Zstandard:
        @staticmethod
        def open(path, mode):
            return gzip.open(path, mode)

    class Arrow:
        def __init__(self, path):
            self.rows = [json.loads(line) for line in Path(path).read_text().splitlines()]

        class ParquetFile:
            def __init__(self, path):
                self.path = path

            def iter_batches(self):
                return [self]

            def to_pylist(self):
                return Arrow(self.path).rows

    (folder / "raw.jsonl.zst").write_bytes(gzip.compress((folder / "raw.jsonl").read_bytes()))
    (folder / "raw.parquet").write_bytes((folder / "raw.jsonl").read_bytes())
    found = {"zstandard": Zstandard, "pyarrow.parquet": Arrow}
    monkeypatch.setattr(optional.importlib, "import_module", found.__getitem__)
    assert list(corpus(folder / "raw.jsonl.zst")) == list(corpus(folder / "raw.parquet")) == TEXTS
    assert len(lines_of(files.run(job(folder, raw=folder / "raw.parquet"), progress=False), folder)) == 7

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(PrunelabError, match="pip install pyarrow"):
        list(corpus(folder / "raw.parquet"))


def lines_of(manifest, folder: Path) -> list[str]:
    return lines(folder / "out" / manifest["out"]["file"])


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prunelab", "select", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command(folder, monkeypatch, capsys):
    files_ = ["--raw", str(folder / "raw.jsonl"), "--target", str(folder / "target.jsonl")]
    out = ["--out", str(folder / "chosen.jsonl")]
    assert command(monkeypatch, "dsir", *files_, "--keep", "5", *out, "--set", "min_length=4") == 0
    assert "kept 5 of 30" in capsys.readouterr().out and len(lines(folder / "chosen.jsonl")) == 5
    for wrong, message in (
        (["dsir", *files_, "--keep", "5", *out], "may choose among 0 of 30"),
        (["dsir", *files_[:2], "--keep", "5", *out], "give its texts as target"),
        (["dsir", *files_, "--keep", "0", *out, "--set", "min_length=4"], "would keep nothing"),
        (["dsir", *files_, "--keep", "5", "--out", files_[1], "--set", "min_length=4"], "name another file"),
        (["dsir", *files_, "--keep", "5", *out, "--workers", "0"], "at least one process"),
        (["dsir", "--raw", str(folder / "none.jsonl"), "--keep", "5", *out], "is no file"),
        (["tome", *files_, "--keep", "5", *out], "does not choose documents by their text"),
    ):
        assert command(monkeypatch, *wrong) == 2
        assert message in capsys.readouterr().err
