"""Replay: a record comes out again bit for bit, and whatever is not as it was is told."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from rich.console import Console

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import planning, provenance, replay, runner, schema
from prunelab.common.experiments.run import Run

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A record of a real run: LexRank on documentation, at smoke scale."""
    config = lookup.settings({"scale": "smoke", "results": str(tmp_path_factory.mktemp("results"))})
    run = planning.resolve(
        "summarise",
        "smoke",
        config,
        schema.Configuration(method="lexrank", budget="2count"),
        data="documentation",
        settings={"samples": 4},
    )
    assert isinstance(run, Run)
    return runner.execute(run, config), config


def altered(made, tmp_path, change):
    """A record with something else in it and a checksum that fits, as another machine might have made it."""
    path, config = made
    record = provenance.read(path)
    change(record)
    other = tmp_path / f"{record['identity']}-{record['sources']}.json"
    provenance.write(other, record)
    return other, config


def test_a_record_comes_out_again_bit_for_bit(made, capsys):
    path, config = made
    assert replay.run(path, config, Console(width=200))
    shown = capsys.readouterr().out
    assert "bit for bit" in shown and "rouge" in shown and "off" not in shown.split("verdict")[1]
    assert list(path.parent.iterdir()) == [path], "what is replayed lies elsewhere"


def test_a_run_survives_the_way_through_its_record(made):
    record = provenance.read(made[0])
    run = replay.run_of(record)
    assert (run.identity, run.sources) == (record["identity"], record["sources"])
    assert json.loads(json.dumps(asdict(run))) == {**record["run"], "needs": "", "names": []}


def test_a_record_that_was_tampered_with_is_told(made, tmp_path):
    path, config = made
    broken = tmp_path / path.name
    broken.write_text(path.read_text().replace('"value": ', '"value": 1', 1))
    with pytest.raises(PrunelabError, match="damaged"):
        replay.run(broken, config, QUIET)
    with pytest.raises(PrunelabError, match="there is no record"):
        replay.run(tmp_path / "nothing.json", config, QUIET)


def test_a_number_that_does_not_come_out_again_is_off(made, tmp_path, capsys):
    def change(record):
        name = sorted(record["metrics"])[0]
        record["metrics"][name]["value"] += 1.0

    path, config = altered(made, tmp_path, change)
    assert not replay.run(path, config, Console(width=200))
    assert "off" in capsys.readouterr().out


def test_a_record_of_another_run_than_its_name_says_is_refused(made, tmp_path):
    path, config = altered(made, tmp_path, lambda record: record["run"].update(budget="1count"))
    with pytest.raises(PrunelabError, match="does not tell of the run"):
        replay.run(path, config, QUIET)
    path, config = altered(made, tmp_path, lambda record: record["run"].pop("task"))
    with pytest.raises(PrunelabError, match="another version"):
        replay.run(path, config, QUIET)


@pytest.mark.parametrize(
    "change",
    [
        {"task": "function", "settings": {"call": "os:system"}},
        {"task": "function", "settings": {"call": "prunelab.methods.x.os.path:exists"}},
        {"task": "../../evil"},
        {"task": "nothing"},
        {"ids": {"data": {"loader": "stories", "folder": "../..", "file": "x"}}},
        {"ids": {"model": {"hub": "/etc"}}},
    ],
)
def test_a_record_of_a_stranger_opens_and_imports_nothing_of_its_own(made, tmp_path, change):
    """Its checksum and its identity fit: whoever makes a record can make these, too."""
    record = provenance.read(made[0])
    record["run"].update(change)
    record["identity"] = replay.run_of(record).identity
    path = tmp_path / f"{record['identity']}-{record['sources']}.json"
    provenance.write(path, record)
    with pytest.raises(PrunelabError, match="asks for"):
        replay.run(path, made[1], QUIET, force=True)


def test_changed_sources_are_refused_and_compared_on_request(made, tmp_path, capsys):
    path, config = altered(made, tmp_path, lambda record: record.update(sources="0" * 12))
    with pytest.raises(PrunelabError, match=r"the sources .* --force"):
        replay.run(path, config, QUIET)
    assert replay.run(path, config, Console(width=200), force=True)
    shown = capsys.readouterr().out
    assert "differs: the sources" in shown and "relative 0.001" in shown


def test_other_versions_are_told_and_compared_within_the_tolerance(made, tmp_path, capsys):
    def change(record):
        record["environment"]["libraries"]["torch"] = "1.0"
        record["environment"]["device"] = "a GPU of another kind"
        metric = record["metrics"][sorted(record["metrics"])[0]]
        metric["value"] *= 1 + 5e-4
        metric.pop("stderr", None)

    path, config = altered(made, tmp_path, change)
    assert replay.run(path, config, Console(width=200))
    shown = capsys.readouterr().out
    assert "torch 1.0, here" in shown and "a GPU of another kind, here cpu" in shown and "within" in shown
    assert not replay.run(path, config, QUIET, tolerance=1e-9)


def test_weights_that_are_others_today_are_told(made, tmp_path):
    model = lookup.resolve("model", "deit_small", "testbed", made[1]).identity
    assert not lookup.moved(model, made[1])
    assert lookup.moved({**model, "sha256": "0" * 64}, made[1])
    with pytest.raises(PrunelabError, match="assets=DIR"):
        lookup.moved({"assets": "stories260k", "sha256": "0"}, {**made[1], "assets": ""})


@pytest.mark.parametrize(
    ("before", "after", "tolerance", "verdict"),
    [
        ({"value": 1.0}, {"value": 1.0}, None, "equal"),
        ({"value": 1.0, "bits": "3"}, {"value": 1.0, "bits": "5"}, None, "off"),
        ({"value": 1.0}, {"value": 1.0 + 1e-9}, None, "off"),
        ({"value": 100.0}, {"value": 100.05}, 1e-3, "within"),
        ({"value": 100.0}, {"value": 100.5}, 1e-3, "off"),
        ({"value": 100.0, "stderr": 10.0}, {"value": 100.5, "stderr": 10.0}, 1e-3, "within"),
        ({"text": "0.7"}, {"text": "0.6"}, 1e-3, "off"),
        ({"value": 1.0}, None, 1e-3, "missing"),
    ],
)
def test_how_a_metric_is_judged(before, after, tolerance, verdict):
    (found,) = replay.compare("classify", {"m": before}, {} if after is None else {"m": after}, tolerance)
    assert found.verdict == verdict


def test_what_a_clock_measured_is_not_judged():
    found = replay.compare("decode", {"speedup": {"value": 1.0}}, {"speedup": {"value": 2.0}}, None)
    assert found[0].verdict == "timed"


def test_the_command_exits_with_one_where_a_number_is_off(made, tmp_path, monkeypatch):
    from prunelab.common import cli

    path, config = altered(made, tmp_path, lambda r: r["metrics"][sorted(r["metrics"])[0]].update(value=-1.0))
    arguments = ["common", "replay", str(path), "--config", f"results={config['results']}"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
