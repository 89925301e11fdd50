"""Boards that decide: the samples they run with on request, and the last such record, which is kept."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import papers, planning, plans, provenance, schema
from prunelab.common.experiments.run import Run
from prunelab.paper_tables import __main__ as command
from prunelab.paper_tables import cross, join, tables

SLUG = "h2o"
MADE = {"started": 1_790_000_000, "seconds": 2.0}  # on 2026-09-21
ENVIRONMENT = {
    "python": "3.11", "machine": "abacus", "libraries": {}, "commit": "c0ffee" * 5, "dirty": False, "device": "cpu",
    "threads": 1, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings for one paper with one board at testbed scale, an empty results folder and nothing kept yet."""
    monkeypatch.setattr(lookup, "_testbed_hash", lambda name: "0" * 64)
    monkeypatch.delenv("PRUNELAB_ASSETS", raising=False)
    monkeypatch.setattr(join, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(provenance, "in_history", lambda commit: True)
    board = schema.Board(
        name="one", task="cache", model="llama_code", data="source_code", metric="accuracy",
        entries={"H2O": "h2o", "sums": "observed"},
        budgets=("0.5", "0.25"), settings={"length": 64, "samples": 2}, full={"testbed": {"samples": 9}},
        scales=("testbed",),
    )  # fmt: skip
    paper = papers.load(SLUG).model_copy(update={"boards": [board], "claims": ()})
    load = papers.load
    monkeypatch.setattr(papers, "load", lambda slug: paper if slug == SLUG else load(slug))
    return lookup.settings({"papers": SLUG, "results": str(tmp_path / "results")})


def points(config: Mapping[str, Any], **changes: Any) -> list[planning.BoardPoint]:
    return list(planning.points(SLUG, {**config, **changes}))


def write(run: Run | str, config: Mapping[str, Any], value: float, **changes: Any) -> Path:
    assert isinstance(run, Run)
    n = run.settings["samples"]
    metrics = {"accuracy": {"value": value, "n": n, "stderr": 1.0, "samples": [value] * n}}
    record = {
        "identity": run.identity, "sources": run.sources, "run": asdict(run), "metrics": metrics,
        "environment": ENVIRONMENT, "timing": MADE,
    } | changes  # fmt: skip
    path = Path(config["results"]) / "records" / f"{record['identity']}-{record['sources']}.json"
    provenance.write(path, record)
    return path


def board(config: Mapping[str, Any]) -> join.BoardTable:
    (found,) = join.boards(SLUG, plans.made(config), join.Records(Path(config["results"])))
    return found


def test_a_default_run_has_few_samples_and_knows_the_run_that_decides(config: dict[str, Any]) -> None:
    for few, full in zip(points(config), points(config, samples="full"), strict=True):
        assert isinstance(few.run, Run) and isinstance(full.run, Run)
        assert (few.run.settings["samples"], full.run.settings["samples"]) == (2, 9)
        assert few.full == full.run and full.full is None
    plan = plans.made(config)
    assert plan.points(SLUG) == points(config)
    assert {run.settings["samples"] for run in plan.jobs().values() if run.task == "cache"} == {2}


def test_kept_records_stand_in_the_board_and_say_so(config: dict[str, Any]) -> None:
    for value, point in enumerate(points(config)):
        write(point.run, config, 10.0 + value)
    assert [p.value.samples for p in board(config).points] == [2] * 5
    full = {**config, "samples": "full"}
    for value, point in enumerate(points(full)):
        write(point.run, full, 40.0 + value)
    assert command.keep_records(full) == 5
    shown = board(config)
    assert [(p.value.value, p.value.samples, p.difference) for p in shown.points] == [
        (40.0, 9, None), (41.0, 9, 1.0), (42.0, 9, 2.0), (43.0, 9, 3.0), (44.0, 9, 4.0),
    ]  # fmt: skip
    told = "kept record, made at revision c0ffeec0ffee on 2026-09-21; by the sources of today"
    assert all(p.value.protocol == told for p in shown.points)
    assert "revision c0ffeec0ffee" in tables.board_csv(shown)
    (order,) = cross.leaderboards([(SLUG, shown)], join.Records(Path(config["results"])))
    assert order.kept == [told] and order.unpruned and order.unpruned.value.value == 40.0
    shutil.rmtree(Path(config["results"]) / "records")
    index, _ = command.build(config)
    page = (index.parent / SLUG / "index.html").read_text(encoding="utf-8")
    assert "kept/" in page
    assert told in page


def test_what_changed_since_is_told(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    full = {**config, "samples": "full"}
    run = points(full)[0].run
    assert isinstance(run, Run)
    write(run, full, 50.0, sources="0" * 12)
    (Path(config["results"]) / "records").rename(join.KEPT)
    assert "its sources have changed since" in board(config).points[0].value.protocol
    monkeypatch.setattr(lookup, "_testbed_hash", lambda name: "1" * 64)  # trained anew
    assert "its sources and versions of model or data have changed since" in board(config).points[0].value.protocol
    other = points(full)[0].run
    assert isinstance(other, Run) and other.identity != run.identity
    kept = join.Records(Path(config["results"])).kept(replace(other, needs="a package"))
    assert kept and "versions" not in kept[1], "what is not at hand cannot be compared"


def test_a_kept_board_takes_no_point_of_few_samples(config: dict[str, Any]) -> None:
    """Differences pair over the same samples: what is not kept says so."""
    for point in points(config):
        write(point.run, config, 10.0)
    full = {**config, "samples": "full"}
    write(points(full)[0].run, full, 50.0)
    command.keep_records(full)
    base, *others = board(config).points
    assert base.value.value == 50.0
    assert all(p.value.value is None and "samples=full" in p.value.status for p in others)


def test_a_newer_record_takes_the_place_of_an_older_one(config: dict[str, Any]) -> None:
    full = {**config, "samples": "full"}
    run = points(full)[0].run
    assert isinstance(run, Run)
    provenance.write(join.KEPT / f"{run.identity}-{'0' * 12}.json", {
        "identity": run.identity, "sources": "0" * 12, "run": asdict(run), "metrics": {}, "environment": ENVIRONMENT,
        "timing": MADE,
    })  # fmt: skip
    path = write(run, full, 50.0)
    command.keep_records(full)
    assert [kept.name for kept in join.KEPT.glob("*.json")] == [path.name]


def test_keeping_asks_for_all_samples(config: dict[str, Any]) -> None:
    with pytest.raises(PrunelabError, match="add --config samples=full"):
        command.keep_records(config)


def test_samples_are_all_or_those_of_a_default_run() -> None:
    with pytest.raises(PrunelabError, match="write samples=full"):
        lookup.settings({"samples": "many"})


def test_a_board_decides_at_scales_that_exist() -> None:
    with pytest.raises(ValidationError, match="full"):
        schema.Board(name="b", task="cache", metric="loss", entries={}, budgets=(), full={"everywhere": {}})  # type: ignore[dict-item]


def test_likeness_forgets_versions_alone(config: dict[str, Any]) -> None:
    run = points(config)[0].run
    assert isinstance(run, Run)
    ids = {of: {**given, "sha256": "2" * 64, "versions": {}} for of, given in run.ids.items()}
    assert replace(run, ids=ids).likeness == run.likeness != replace(run, budget="0.1").likeness


def test_what_nobody_can_repeat_is_not_kept(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    full = {**config, "samples": "full"}
    run = points(full)[0].run
    for change, reason in (
        ({"dirty": True}, "changes to revision c0ffeec0ffee that no revision has"),
        ({"commit": None}, "from no revision"),
    ):
        write(run, full, 50.0, environment=ENVIRONMENT | change)
        with pytest.raises(PrunelabError, match=reason):
            command.keep_records(full)
    write(run, full, 50.0)
    monkeypatch.setattr(provenance, "in_history", lambda commit: False)
    with pytest.raises(PrunelabError, match="not in the history; make it anew"):
        command.keep_records(full)
    assert not list(join.KEPT.glob("*"))
    monkeypatch.setattr(provenance, "in_history", lambda commit: None)  # nothing tells, so nothing is refused
    assert command.keep_records(full) == 1


def test_history_knows_its_own_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str, folder: Path = tmp_path / "one") -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always")
        done = subprocess.run(["git", *name, *args], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "one").mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "one")
    assert provenance.in_history("c0ffee") is None, "a copy without git"
    git("init", "-q")
    for message in ("first", "second", "rewritten"):
        git("commit", "-q", "--allow-empty", "-m", message)
    lost = git("rev-parse", "HEAD")
    git("reset", "-q", "--hard", "HEAD~1")
    assert provenance.in_history(git("rev-parse", "HEAD~1")) is True
    assert provenance.in_history(lost) is False, "git still has it, and no clone will"
    assert provenance.in_history("c0ffee" * 5) is False
    git("clone", "-q", "--depth", "1", f"file://{tmp_path / 'one'}", str(tmp_path / "two"))
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "two")
    assert provenance.in_history(lost) is None, "a shallow clone"


def test_every_kept_record_can_be_repeated() -> None:
    """Its revision is in the history, wherever there is one."""
    kept = sorted(join.KEPT.glob("*.json"))
    assert kept
    assert not {path.name: reason for path in kept if (reason := provenance.repeatable(provenance.read(path)))}


def test_of_every_run_the_last_record_alone_is_kept() -> None:
    kept = [path.name.partition("-")[0] for path in join.KEPT.glob("*.json")]
    assert len(kept) == len({*kept})


def test_every_kept_record_is_whole_and_of_a_board() -> None:
    """What is kept under version control is readable, and a board with such a task still decides by it."""
    kept = sorted(join.KEPT.glob("*.json"))
    runs = {provenance.read(path)["run"]["task"] for path in kept}
    assert runs <= {board.task for slug in papers.slugs() for board in papers.load(slug).boards if board.full}


def test_what_a_row_really_kept_stands_beside_it(config: dict[str, Any]) -> None:
    for value, point in enumerate(points(config)):
        assert isinstance(point.run, Run)
        n = point.run.settings["samples"]
        write(point.run, config, 10.0, metrics={
            "accuracy": {"value": 10.0 + value, "n": n, "stderr": 1.0, "samples": [10.0] * n}, "kept": {"value": 33.3},
        })  # fmt: skip
    shown = board(config)
    assert [p.value.kept for p in shown.points] == [None] + [33.3] * 4, "the unpruned model has no method"
    assert tables.board_csv(shown).splitlines()[0].endswith(",kept") and tables.board_csv(shown).count(",33.3") == 4
    assert tables.board_grid(SLUG, shown).rows[1][2].endswith("kept 33.3 %")
    index, _ = command.build(config)
    page = (index.parent / SLUG / "index.html").read_text(encoding="utf-8")
    assert page.count(">kept 33.3 %</span>") == 4
