"""What tasks say of themselves, and how planning finds a paper.yaml's mistakes by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from prunelab.common import tasks
from prunelab.common.catalogue import lookup
from prunelab.common.core import index, options, registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT
from prunelab.common.experiments import papers, planning, plans, schema
from tests import guide

ROLES = {entry.role for entry in index.entries().values()}


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_is_one_module_that_says_what_it_is(name):
    task = tasks.get(name)
    assert task.name == name and (task.__doc__ or "").strip() and (task.Settings.__doc__ or "").strip()
    assert set(task.roles) <= ROLES, "roles of methods that exist"
    assert set(task.count) <= task.metrics.keys()
    assert set(task.scales) <= {"testbed", "real", "assets", "paper"}
    assert not task.needs_gpu or task.scales == ("paper",)
    documented = task.Settings.__doc__ or ""
    for setting in task.known():
        known = setting in ("seed", "seeds", "samples")
        assert known or setting in documented or setting in (task.__doc__ or ""), setting


@pytest.mark.parametrize("name", tasks.names())
def test_every_number_of_a_task_has_a_range(name):
    settings = tasks.get(name).Settings
    for setting, hint in get_type_hints(settings, include_extras=True).items():
        assert setting == "model_config" or not options.unbounded(hint), f"{name}: {setting}, see core/options.py"


def test_declarations_need_no_torch():
    code = (
        "import sys; from prunelab.common import tasks; [tasks.get(name) for name in tasks.names()];"
        " sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lm_eval')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_settings_are_read_by_their_types():
    perplexity = tasks.get("perplexity")
    read = perplexity.read({"length": 512, "calibration": 8})
    assert (read.length, read.calibration, read.seed, read.samples) == (512, 8, 0, None)
    for given, message in (
        ({"lenght": 512}, "no setting 'lenght'; did you mean 'length'"),
        ({}, "needs the setting 'length'"),
        ({"length": "many"}, "the setting 'length' of the task perplexity: "),
        ({"length": 0}, "the setting 'length' of the task perplexity: .* greater than 0"),
    ):
        with pytest.raises(PrunelabError, match=message):
            perplexity.read(given)
    assert tasks.get("constrained").read({"after": "=", "samples": 1, "json": 2}).json_depth == 2


def test_what_is_better_is_said_of_every_board_of_quality():
    for slug in papers.slugs():
        for board in papers.load(slug).boards:
            task = tasks.get(board.task)
            assert not task.scales or task.metric(board.metric).higher_is_better is not None or board.metric == "kept"


SOURCE = """
title: T
authors: [A B]
venue: V
year: 2024
family: vit
taxonomy: {}
status: none
configurations:
  half: {method: tome, options: {OPTION: false}, budget: "BUDGET", settings: {SETTING: 1}}
tables:
  - name: T1
    model: MODEL
    columns:
      top-1: {task: TASK, metric: METRIC, data: DATA, settings: {KEY: true}}
    rows: {r: half}
boards:
  - {name: b, task: classify, model: deit_small, data: imagenet, metric: BOARD, entries: {e: half}, budgets: ["0.5"]}
"""
GOOD = {
    "OPTION": "proportional", "BUDGET": "4removed", "SETTING": "seed", "MODEL": "deit_small", "TASK": "classify",
    "METRIC": "top1", "DATA": "imagenet", "KEY": "against_dense", "BOARD": "top1",
}  # fmt: skip
PLACE = "methods/wrong/paper.yaml, line 15, table 'T1', row 'r', column 'top-1': "


def written(folder: Path, monkeypatch, **changes: str) -> None:
    text = SOURCE
    for key, value in (changes | {key: value for key, value in GOOD.items() if key not in changes}).items():
        text = text.replace(key, value)
    (folder / "wrong").mkdir()
    (folder / "wrong" / "paper.yaml").write_text(text)
    (folder / "wrong" / "reported.csv").write_text(
        "table,row,column,value,unit,source,quality\nT1,r,top-1,80.0,%,page 1,primary\n"
    )
    monkeypatch.setattr(papers, "METHODS", folder)
    papers.load.cache_clear()
    papers.about.cache_clear()
    papers.reported.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TASK": "classfy"}, PLACE + "there is no task 'classfy'; did you mean 'classify'"),
        ({"METRIC": "top_1"}, PLACE + "the task classify gives no metric 'top_1'; did you mean 'top1'"),
        ({"KEY": "against_dens"}, PLACE + "the task classify has no setting 'against_dens'; did you mean 'against_de"),
        ({"DATA": "imagnet"}, PLACE + "there is no data set 'imagnet'; did you mean imagenet"),
        ({"MODEL": "deit_smal"}, PLACE + "there is no model 'deit_smal'; did you mean deit_small"),
        ({"OPTION": "proportionl"}, PLACE + "tome has no option 'proportionl'; did you mean proportional"),
        ({"OPTION: false": "OPTION: often"}, PLACE + "tome: proportional must be true or false, not 'often'"),
        ({"OPTION: false": "inflection: 2"}, PLACE + "tome: inflection must be a number from -1 to 1, not 2"),
        ({"BUDGET": "4remove"}, PLACE + "budget unit 'remove' is unknown"),
        (
            {"SETTING": "sead"},
            "paper.yaml, line 10, configuration 'half': no task .* has a setting 'sead'; did you mean 'seed'",
        ),
        ({"BOARD": "top5"}, "paper.yaml, line 18, board 'b': the task classify gives no metric 'top5'"),
        (
            {"family: vit": "family: vti"},
            "paper.yaml, line 6, family: there is no 'vti'; did you mean",
        ),
        (
            {"taxonomy: {}": "taxonomy: {targets: [tokens]}"},
            "line 7, taxonomy: there is no 'targets'; did",
        ),
        (
            {"taxonomy: {}": "taxonomy: {target: [token]}"},
            "line 7, taxonomy, target: there is no 'token'; did you mean 'tokens'",
        ),
        (
            {"rows: {r: half}": "needs: {judges: a judge}"},
            "line 16, tables.0.needs.judges.*: Input should be 'jud",
        ),
        (
            {"rows: {r: half}": "needs: a judge"},
            "paper.yaml, line 16, tables.0.needs: .* valid dictionary",
        ),
        ({"rows: {r: half}": "needs: {}"}, "paper.yaml, line 16, tables.0.needs: .* at least 1 item"),
        ({"method: tome": "method: tom"}, PLACE + "there is no method 'tom'; did you mean"),
        ({"method: tome": "method: wanda"}, PLACE + "wanda has no option|" + PLACE + "the task classify is run under"),
    ],
)
def test_a_misspelt_name_is_an_error_on_a_laptop(tmp_path, monkeypatch, change, message):
    written(tmp_path, monkeypatch, **change)
    with pytest.raises(PrunelabError, match=message):
        planning.check("wrong")


def test_a_paper_without_mistakes_passes(tmp_path, monkeypatch):
    written(tmp_path, monkeypatch)
    planning.check("wrong")


def test_what_nothing_here_can_run_says_so_by_one_of_a_few_reasons(tmp_path, monkeypatch):
    written(tmp_path, monkeypatch, **{"rows: {r: half}": "needs: {judge: a judge of answers}"})
    (cell,) = planning.cells("wrong", lookup.settings({}))
    assert cell.reason == "judge" and cell.runs == {"paper": "a judge of answers"}
    assert set(schema.REASONS) == set(get_args(get_args(get_args(schema.Needs)[0])[0]))


def test_what_runs_under_an_assumption_says_so_wherever_it_is_said(tmp_path, monkeypatch):
    assumes = {
        "{method: tome": "{assumes: ties go to the first, method: tome",
        "{task: TASK": "{assumes: a drawn half of the set, task: TASK",
        "  - name: T1": "  - name: T1\n    assumes: seed 0 of the authors",
        "rows: {r: half}": "rows: {r: {configuration: half, assumes: seed 0 of the authors}}",
    }
    written(tmp_path, monkeypatch, **assumes)
    config = lookup.settings({"papers": "wrong"})
    (cell,) = planning.cells("wrong", config)
    assert cell.assumes == "seed 0 of the authors; ties go to the first; a drawn half of the set"
    plan = plans.made(config)
    (again,), (outcome,) = plan.cells("wrong"), plan.outcomes()
    assert again.assumes == outcome.assumes == cell.assumes and set(outcome.runs["paper"]) <= plan.runs.keys()


def test_an_assumption_has_words(tmp_path, monkeypatch):
    written(tmp_path, monkeypatch, **{"{method: tome": "{assumes: yes, method: tome"})
    with pytest.raises(PrunelabError, match=r"configurations\.half\.assumes"):
        planning.check("wrong")


@pytest.mark.parametrize("slug", papers.slugs())
def test_every_paper_passes(slug):
    planning.check(slug)
    paper = papers.load(slug)
    assert papers.about(slug).model_dump() == paper.model_dump(include=set(schema.About.model_fields)), (
        "the head is first"
    )
    for configuration in papers.load(slug).configurations.values():
        if configuration.method is not None:  # planning knows the names of options, the class what they may be
            registry.create(configuration.method, **configuration.options)


def test_the_guide_has_the_tables_that_the_code_has():
    page = guide.PAGE.read_text(encoding="utf-8")
    assert guide.written(page) == page, "python -m tests.guide"


def test_a_folder_without_a_paper_yet_breaks_nothing(tmp_path, monkeypatch):
    (tmp_path / "fastv").mkdir()  # a method whose paper.yaml is still to be written
    monkeypatch.setattr(papers, "METHODS", tmp_path)
    papers.load.cache_clear()
    papers.about.cache_clear()
    assert papers.slugs() == [] and plans.made(lookup.settings({"papers": "all"})).jobs() == {}
    with pytest.raises(PrunelabError, match="there is no paper 'fastv'"):
        papers.load("fastv")


MEANS = """
  - name: T1
    model: llava_1_5_7b
    columns: {GQA: gqa, POPE: pope, CN: mmbench_cn, Avg: {mean: MEMBERS}}
    unpruned: UNPRUNED
    rows: {"*": half}
"""
NUMBERS = """table,row,column,value,unit,source,quality
T1,a full,GQA,62,%,page 1,primary
T1,a full,POPE,80,%,page 1,primary
T1,a half,Avg,90,%,page 1,primary
T1,b full,GQA,50,%,page 1,primary
T1,b full,POPE,70,%,page 1,primary
T1,b half,Avg,91,%,page 1,primary
"""


def _means(folder, monkeypatch, members, unpruned, rows='"*": half'):
    written(folder, monkeypatch)
    head = SOURCE.split("tables:")[0]
    for key, value in GOOD.items():
        head = head.replace(key, value)
    tables = MEANS.replace("MEMBERS", members).replace("UNPRUNED", unpruned).replace('"*": half', rows)
    (folder / "wrong" / "paper.yaml").write_text(head + "tables:" + tables)
    (folder / "wrong" / "reported.csv").write_text(NUMBERS)
    return {cell.reported.row: cell for cell in planning.cells("wrong", lookup.settings({"scale": "paper"}))}


def test_a_column_of_means_is_one_run_of_its_members_against_the_unpruned_models_numbers(tmp_path, monkeypatch):
    cell = _means(tmp_path, monkeypatch, "all", "T1/a full")["a half"]
    assert cell.metric == "relative" and not cell.reason
    assert cell.runs["paper"].settings["against"] == [62, 80]
    assert cell.runs["paper"].settings["average"] == ["gqa exact_match", "pope pope_f1_score"]
    assert cell.assumes == ""  # MMBench-CN has no number to be a share of


def test_means_of_listed_columns_are_plain_and_assume_what_their_members_assume(tmp_path, monkeypatch):
    cell = _means(tmp_path, monkeypatch, "[GQA, CN]", '""')["a half"]
    assert cell.metric == "average" and "against" not in cell.runs["paper"].settings
    assert cell.assumes == papers.benchmarks()["mmbench_cn"]["assumes"]


def test_rows_of_several_models_are_each_against_their_own(tmp_path, monkeypatch):
    rows = "a half: half, b half: half, a full: dense, b full: dense"
    cells = _means(tmp_path, monkeypatch, "all", "{a: T1/a full, b: T1/b full}", rows)
    assert [cells[row].runs["paper"].settings["against"] for row in ("a half", "b half")] == [[62, 80], [50, 70]]


@pytest.mark.parametrize(
    ("members", "unpruned", "message"),
    [
        ("all", "T1/c", "`unpruned` says T1/c, and reported.csv has no such"),
        ("[GQA, CN]", "T1/a full", "needs the unpruned model's number for CN"),
        ("[GQA, PPE]", "T1/a full", "no column of scores named 'PPE'"),
        ("all", "{b: T1/b full}", "says no row for"),
    ],
)
def test_means_that_cannot_be_made_are_refused(tmp_path, monkeypatch, members, unpruned, message):
    with pytest.raises(PrunelabError, match=message):
        _means(tmp_path, monkeypatch, members, unpruned)
