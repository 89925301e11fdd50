"""Numbers that are made of several runs: how papers say so, what planning makes of it, and their values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import derived, forecast, overview, papers, planning, plans, prefetch, provenance
from prunelab.common.experiments.derived import Derived
from prunelab.paper_tables import __main__ as command
from prunelab.paper_tables import join, tolerance

SOURCE = """
title: T
authors: [A B]
venue: V 2024
family: vit
status: none
configurations:
  half: {method: tome, budget: "4removed"}
tables:
  - name: T1
    model: deit_small
    columns: &two
      top-1: &top {task: classify, metric: top1, data: imagenet}
      again: {<<: *top, metric: gmacs, assumes: counted by our own rules}
      both: {derived: MADE}
      judged: {needs: {judge: a paid one}}
    rows: {a: half, b: dense}
  - name: T2
    columns:
      gap: {derived: {difference: [{table: T1, row: b, column: top-1}, {table: T1, row: a, column: top-1}]}}
  - name: T3
    model: deit_small
    columns: {top-1: *top}
    rows: {"*": half}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(lookup, "_testbed_hash", lambda name: "0" * 64)
    write(tmp_path, monkeypatch)
    return lookup.settings({"papers": "made", "results": str(tmp_path / "results")})


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, made: str = "{mean: [top-1, again]}") -> None:
    (folder / "made").mkdir(exist_ok=True)
    (folder / "made" / "paper.yaml").write_text(SOURCE.replace("MADE", made))
    (folder / "made" / "reported.csv").write_text(
        "table,row,column,value,unit,source,quality\nT1,a,both,60,%,page 1,primary\nT2,c,gap,1.5,%,page 1,primary\n"
    )
    monkeypatch.setattr(papers, "METHODS", folder)
    for cached in (papers.load, papers.about, papers.reported):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("how", "values", "wanted", "error"),
    [
        ("mean", (1.0, 2.0, 6.0), 3.0, math.hypot(0.1, 0.2, 0.2) / 3),
        ("difference", (5.0, 2.0), 3.0, math.hypot(0.1, 0.2)),
        ("ratio", (6.0, 2.0), 3.0, math.hypot(0.1 / 2, 0.2 * 6 / 4)),
        ("share", (6.0, 2.0), 300.0, 100 * math.hypot(0.1 / 2, 0.2 * 6 / 4)),
        ("saving", (40.0, 30.0), 25.0, 100 * math.hypot(0.1 * 30 / 1600, 0.2 / 40)),
    ],
)  # fmt: skip
def test_values_and_the_errors_that_follow_from_their_results(how, values, wanted, error):
    value, slopes = derived.combined(how, values)
    errors = (0.1, 0.2, 0.2)[: len(values)]
    assert value == pytest.approx(wanted)
    assert math.hypot(*(s * e for s, e in zip(slopes, errors, strict=True))) == pytest.approx(error)
    for i, slope in enumerate(slopes):  # as the value really moves
        moved = [v + 1e-6 * (j == i) for j, v in enumerate(values)]
        assert (derived.combined(how, moved)[0] - value) / 1e-6 == pytest.approx(slope, rel=1e-4)


def test_results_of_one_run_err_together_and_those_of_several_do_not(config):
    first, second = plans.made(config).cells("made")[1].runs["testbed"].runs
    errors = {"top1": 0.3, "gmacs": 0.1}

    def error(how, *of):
        return Derived(how, of).value(lambda run, metric: (2.0, errors[metric]))[1]

    one, same, other = (first, "top1"), (first, "gmacs"), (second, "top1")
    assert error("mean", one, one) == pytest.approx(0.3) and error("difference", one, one) == 0
    assert error("mean", one, same) == pytest.approx(0.2)
    assert error("mean", one, other) == pytest.approx(math.hypot(0.15, 0.15))
    assert error("mean", Derived("mean", (one, other)), one) == pytest.approx(math.hypot(0.75 * 0.3, 0.25 * 0.3))


def test_what_is_not_finite_says_so_in_place_of_a_value(config):
    plan = plans.made(config)
    cell = plan.cells("made")[1]
    for run in cell.runs["testbed"].runs:
        record = {"identity": run.identity, "sources": run.sources, "run": {"method": run.method}}
        provenance.write(
            run.path(Path(config["results"])),
            {**record, "timing": {}, "environment": {}, "metrics": {"top1": {"value": math.inf, "stderr": 0.1}}},
        )
    found = join.Records(Path(config["results"])).value(cell.runs["testbed"], cell.metric, "testbed")
    assert found.value is None and found.needs == derived.FINITE


def test_nothing_is_a_share_of_zero():
    assert math.isnan(derived.combined("ratio", (1.0, 0.0))[0]) and math.isnan(
        derived.combined("saving", (0.0, 1.0))[0]
    )


def test_a_plan_holds_the_runs_of_what_is_derived_and_every_reader_finds_them(config):
    plan = plans.made(config)
    mean, gap = plan.cells("made")
    assert [cell.runs for cell in (mean, gap)] == [cell.runs for cell in planning.cells("made", config)]
    made = gap.runs["testbed"]
    assert isinstance(made, Derived) and made.how == "difference" and mean.assumes == "counted by our own rules"
    first, second = made.runs
    assert (first.method, second.method) == (None, "tome") and {first.address, second.address} <= plan.jobs().keys()
    same = mean.runs["testbed"]
    assert isinstance(same, Derived) and [run.method for run in same.runs] == ["tome"], "two metrics of one run"
    outcomes = list(plan.outcomes())
    assert set(outcomes[1].runs["paper"]) <= plan.runs.keys() and len(outcomes[1].runs["paper"]) == 2
    counted = overview.overview(config)
    assert (counted.reported, counted.executable, counted.assumed, counted.made) == (2, 2, 1, 2)
    assert {("model", "deit_small"), ("dataset", "imagenet")} <= {(i.kind, i.name) for i in prefetch.items(config)}
    outlook = forecast.Outlook(plan, forecast.gpu("h200"))
    assert [len(lacks) for _, lacks, _ in outlook.waiting] == [1, 2]
    assert outlook.note("made", gap).count("--column gap") == 1 and len(outlook.fitting(1e6)) == 2
    each = {run.identity: outlook.of(run).hours for _, lacks, _ in outlook.waiting for run in lacks}
    assert all(hours is not None for hours in each.values())
    (one,) = outlook.waiting[0][1]
    assert outlook.fitting(each[one.identity] * 1.001) == outlook.waiting[:1], "no hours go to half of a difference"
    assert outlook.total([lacks for _, lacks, _ in outlook.waiting])["runs"] == 2, "each counts once"


def test_the_value_is_there_when_all_records_are_and_goes_stale_with_them(config):
    plan = plans.made(config)
    _, cell = plan.cells("made")
    made = cell.runs["testbed"]
    assert isinstance(made, Derived)
    for run, share, told in zip(made.runs, (80.0, 78.0), (None, 2.0), strict=True):
        found = join.Records(Path(config["results"])).value(made, cell.metric, "testbed")
        assert found.value is None and found.needs == join.MISSING, told
        record = {
            "identity": run.identity,
            "sources": run.sources,
            "run": {"method": run.method},
            "timing": {"seconds": 1.0},
        }
        record |= {"metrics": {"top1": {"value": share, "n": 10_000, "stderr": 0.3}}, "environment": {}}
        provenance.write(run.path(Path(config["results"])), record)
    found = join.Records(Path(config["results"])).value(made, cell.metric, "testbed")
    assert found.value == pytest.approx(2.0) and found.stderr == pytest.approx(math.hypot(0.3, 0.3))
    assert found.status == "testbed" and all(run.address in found.protocol for run in made.runs)
    held = tolerance.of(cell, found.stderr)
    assert held is not None and held.value == pytest.approx(0.05 + math.hypot(0.3, 0.3), abs=1e-6)
    (_, (line,)) = (table.lines for table in join.tables("made", plan, join.Records(Path(config["results"]))))
    assert line.outcome == "ready" and line.others["testbed"].value == pytest.approx(2.0)
    index, found = command.build(config)
    text = (index.parent / "made" / "index.html").read_text(encoding="utf-8")
    assert len(found) == 2 and "2.00 ± 0.83" in text and "the difference of 2 results, of the runs" in text


def test_what_a_member_lacks_is_what_it_lacks(config, tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, "{mean: [top-1, judged]}")
    cell = next(planning.cells("made", config))
    assert cell.reason == "judge" and cell.runs == {"paper": "a paid one"} and tolerance.of(cell) is None


def test_derivations_may_stand_in_each_other(config, tmp_path, monkeypatch):
    write(
        tmp_path, monkeypatch, "{ratio: [{mean: [top-1, {row: b, column: top-1}]}, {table: T2, row: c, column: gap}]}"
    )
    made = next(planning.cells("made", config)).runs["paper"]
    assert isinstance(made, Derived) and len(made.leaves()) == 4 and len(made.runs) == 2
    assert made.value(lambda run, _: (4.0 if run.method else 6.0, None)) == (2.5, None)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("{mean: [top-1]}", r"columns\.both\.derived.*write one of mean"),
        ("{difference: [top-1, again, again]}", "write one of mean"),
        ("{mean: [top-1, again], ratio: [top-1, again]}", "write one of mean"),
        ("{mean: [top-1, top-2]}", "there is no column 'top-2'"),
        ("{mean: [top-1, {table: T4, column: gap}]}", "there is no table 'T4'; known: T1, T2, T3"),
        ("{mean: [top-1, both]}", "derived of itself"),
        ("{mean: [top-1, {row: d, column: top-1}]}", "there is no row 'd'"),
        ("{mean: [top-1, {table: T3, row: a, column: top-1}]}", "there is no row 'a'"),
    ],
)
def test_a_mistake_names_the_place(config, tmp_path, monkeypatch, made, message):
    write(tmp_path, monkeypatch, made)
    with pytest.raises(PrunelabError, match=message):
        planning.check("made")
