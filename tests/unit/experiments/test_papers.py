"""Papers, runs and records: nothing reported goes missing, and a record is what its address says."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from prunelab.common.catalogue import hub, lookup
from prunelab.common.core import files, registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import papers, planning, plans, provenance, schema
from prunelab.common.experiments.derived import behind
from prunelab.common.experiments.run import Run

SETTINGS = lookup.settings({})


@pytest.mark.parametrize("slug", papers.slugs())
def test_every_reported_number_has_a_run_or_a_reason(slug):
    found = list(planning.cells(slug, SETTINGS))
    assert [c.reported for c in found] == list(papers.reported(slug))
    for cell in found:
        assert "paper" in cell.runs
        assert all(run if isinstance(run, str) else list(behind(run)) for run in cell.runs.values())
        assert cell.reason or not isinstance(cell.runs["paper"], str), "what has no run says why"
        assert cell.reported.source


@pytest.mark.parametrize("slug", papers.slugs())
def test_taxonomy_uses_the_surveys_terms(slug):
    taxonomy = papers.load(slug).taxonomy
    assert set(taxonomy) == set(schema.AXES)
    for axis, values in taxonomy.items():
        assert values and set(values) <= set(schema.AXES[axis]), axis


def test_every_folder_is_complete_and_every_method_has_a_paper():
    for name, method in registry.load().items():
        folder = papers.METHODS / registry.slug(method)
        for file in ("method.py", "paper.yaml", "reported.csv", "README.md", "__init__.py"):
            assert (folder / file).exists(), f"{name} lacks {file}"
        assert planning.entries("classify", name)[1] == f"methods/{folder.name}/method.py"


def test_methods_stay_small():
    """What is to be read as code; documentation may be as long as it has to."""
    for path in papers.METHODS.glob("*/method.py"):
        text = path.read_text()
        owners = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        documented = [n.body[0] for n in owners if ast.get_docstring(n) is not None]
        assert len(text.splitlines()) - sum(d.end_lineno - d.lineno + 1 for d in documented) <= 260, path


def run(slug: str = "zero_tprune") -> Run:
    return next(c.runs["paper"] for c in planning.cells(slug, SETTINGS) if c.status == "analytic")  # type: ignore[return-value]


def test_address_names_what_is_run_and_what_runs_it():
    base = run()
    assert replace(base, budget="0.5").identity != base.identity
    assert replace(base, needs="a GPU").address == base.address
    fewer = replace(base, entries=("common/tasks/macs.py",))
    assert fewer.identity == base.identity
    assert fewer.sources != base.sources


def test_sources_follow_imports():
    names = {p.name for p in provenance.closure([files.ROOT / "common/tasks/classify.py"])}
    assert {"classify.py", "apply.py", "selection.py", "plan.py", "digits.py"} <= names
    assert "planning.py" not in names


def test_planning_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from prunelab.common.experiments import plans; from prunelab.common.catalogue import lookup; "
        "plans.made(lookup.settings({})).jobs(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, check=False).returncode == 0


def test_records_survive_a_round_trip_and_nothing_else(tmp_path):
    base = run()
    path = base.path(tmp_path)
    provenance.write(path, {"identity": base.identity, "sources": base.sources, "metrics": {"macs": {"value": 1.0}}})
    assert provenance.read(path)["metrics"]["macs"]["value"] == 1.0
    assert not provenance.reject_damaged(path)
    content = json.loads(path.read_text())
    content["metrics"]["macs"]["value"] = 2.0
    path.write_text(json.dumps(content))
    with pytest.raises(PrunelabError, match="damaged"):
        provenance.read(path)
    assert provenance.reject_damaged(path)
    assert not path.exists()
    assert path.with_suffix(".rejected").exists()


def test_a_record_under_another_name_is_refused(tmp_path):
    base = run()
    other = replace(base, budget="0.123").path(tmp_path)
    provenance.write(other, {"identity": base.identity, "sources": base.sources, "metrics": {}})
    with pytest.raises(PrunelabError, match="damaged"):
        provenance.read(other)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        provenance.write(tmp_path / "a.json", {"identity": object()})
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "b.txt", "\udc80")
    assert not list(tmp_path.iterdir())


def downloaded(name: str, folder: Path, monkeypatch) -> None:
    """A repository of the hub that is locked, and said to be whole in the hub client's cache."""
    lock = hub.Lock(models={name: hub.Locked(revision="0" * 40)})
    monkeypatch.setattr(hub, "lock", lambda: lock)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    storage = hub.storage(folder, name, "model")
    (storage / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (storage / hub.RECEIPT).write_text(f'{{"{"0" * 40}": ["*"]}}')


def test_paper_records_of_older_sources_are_stale_and_not_rerun(tmp_path, monkeypatch):
    monkeypatch.setitem(lookup._read("datasets.yaml")["imagenet"]["paper"], "setting", "results")  # at hand
    downloaded("timm/deit_small_patch16_224.fb_in1k", tmp_path, monkeypatch)
    config = {**SETTINGS, "scale": "paper", "results": str(tmp_path)}
    wanted = {a: r for a, r in plans.made(config).jobs().items() if r.scale == "paper"}
    assert wanted
    job = next(iter(wanted.values()))
    old = tmp_path / "records" / f"{job.identity}-{'0' * 12}.json"
    record = {"identity": job.identity, "sources": "0" * 12, "run": {"method": None}}
    provenance.write(old, {**record, "metrics": {"top1": {"value": 50.0}}})
    assert job.address not in plans.made(config).jobs()
    from prunelab.paper_tables.join import Records

    value = Records(tmp_path).value(job, "top1", "measured")
    assert (value.status, value.value) == ("stale", 50.0)


BROKEN = [
    ("tables:\n  - {name: T, rows: {a: nobody}}", "unknown configuration"),
    ("tables:\n  - {name: T, columns: {c: {configuration: nobody}}}", "column 'c' names the unknown configuration"),
    ("tables:\n  - {name: T, rows: {a: {columns: {c: {configuration: nobody}}}}}", "row 'a' names the unknown"),
    ("colour: red", "colour"),
    ("tables: [", "not valid YAML"),
    ("tables:\n  - {name: T, name: U}", "line [0-9]+ gives the key 'name' a second time"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_broken_paper_is_named(tmp_path, monkeypatch, text, message):
    folder = tmp_path / "broken"
    folder.mkdir()
    source = (papers.METHODS / "cls_attention" / "paper.yaml").read_text()
    (folder / "paper.yaml").write_text(f"{source}\n{text}\n")
    monkeypatch.setattr(papers, "METHODS", Path(tmp_path))
    with pytest.raises(PrunelabError, match=message):
        papers.load("broken")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("T,a,top1,many,%,page 3,primary", "line 3: 'many' is no number"),
        ("T,a,top1,71.5,%,page 3,certain", "line 3: its quality is one of primary, secondary, by-eye, not 'certain'"),
        ("T,a,top1,71.5,%,,primary", "line 3: a number needs its source"),
        ("T,a,top1,71.5,%,primary", "line 3: write table,row,column,value"),
        ("T,a,top1,71.5,%,page 3,primary,really", "line 3: write table,row,column,value"),
        ("T,b,top1,71.5,%,page 3,primary", "line 3: an earlier line has the same table, row and column"),
    ],
)
def test_a_broken_number_is_named(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(papers, "METHODS", Path(tmp_path))
    head = "table,row,column,value,unit,source,quality\nT,b,top1,70,%,page 3,primary\n"
    for folder, text in ((tmp_path / "broken", head + line), (tmp_path / "whole", head)):
        folder.mkdir()
        (folder / "reported.csv").write_text(text)
    with pytest.raises(PrunelabError, match=message):
        papers.reported("broken")
    assert [number.text for number in papers.reported("whole")] == ["70"]
    papers.reported.cache_clear()
    with pytest.raises(PrunelabError, match=r"no reported\.csv"):
        papers.reported("absent")


def test_missing_pieces_are_named():
    with pytest.raises(PrunelabError, match="no paper 'nobody'"):
        papers.load("nobody")
    with pytest.raises(PrunelabError, match="no model 'nobody'"):
        lookup.model("nobody")
    with pytest.raises(PrunelabError, match="there is no method 'nobody'"):
        planning.entries("classify", "nobody")


def test_paper_scale_runs_the_whole_set_and_only_pinned_checkpoints(tmp_path, monkeypatch):
    config = {**SETTINGS, "scale": "paper", "imagenet": str(tmp_path), "assets": ""}
    assert not [r for r in plans.made(config).jobs().values() if r.task == "classify"]
    needs = [getattr(c.runs["paper"], "needs", "") for c in planning.cells("zero_tprune", config)]
    assert any("a pinned revision of timm/deit_small" in reason for reason in needs)
    downloaded("timm/deit_small_patch16_224.fb_in1k", tmp_path, monkeypatch)
    (job, *_) = [r for r in plans.made(config).jobs().values() if r.task == "classify"]
    assert job.ids["model"]["revision"] == "0" * 40
    assert "samples" not in job.settings


# -- language models: settings by scale, calibration sets and bases ---------------------------------------------------


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Settings under which every testbed has weights."""
    (tmp_path / "training.json").write_text('{"sha256": "0"}')
    monkeypatch.setattr(lookup, "_training", lambda testbed: tmp_path / "training.json")
    monkeypatch.setattr(lookup, "_testbed_hash", lambda name: name)
    return SETTINGS


def perplexity(config, configuration, scale="testbed", **given):
    settings = {"length": 4096, "calibration": 128, "calibration_data": "c4", **given.pop("settings", {})}
    given = {"model": "llama_7b", "data": "wikitext2", "budget": "0.5", **given}
    return planning.resolve(
        "perplexity", scale, config, schema.Configuration(**configuration), settings=settings, **given
    )


def test_calibration_is_part_of_a_runs_identity(trained):
    wanda = {"method": "wanda"}
    runs = [
        perplexity(trained, wanda, "paper"),
        perplexity(trained, wanda, "paper", settings={"calibration": 64}),
        perplexity(trained, wanda, "paper", settings={"calibration_data": "wikitext2"}),
        perplexity(trained, wanda, "paper", settings={"length": 2048}),
        perplexity(trained, wanda | {"settings": {"calibration": 7}}, "paper"),
    ]
    assert len({run.identity for run in runs}) == len(runs)
    assert runs[0].ids["calibration"]["loader"] == "c4" and runs[2].ids["calibration"]["loader"] == "wikitext"
    assert runs[4].settings["calibration"] == 7


def test_the_unpruned_model_is_one_run_whatever_calibrates_the_others(trained):
    runs = {perplexity(trained, {}, "paper", settings={"calibration": n}).identity for n in (8, 16)}
    assert len(runs) == 1
    assert "calibration" not in perplexity(trained, {}).ids


def test_a_stand_in_has_settings_of_its_own_and_is_shared(trained):
    a = perplexity(trained, {"method": "wanda"})
    b = perplexity(
        trained, {"method": "wanda"}, model="llama2_70b", settings={"length": 128, "calibration_data": "wikitext2"}
    )
    assert a.identity == b.identity  # another paper's model, length and calibration set: the same stand-ins
    assert a.settings["length"] == 512 and "settings" not in a.ids["data"]
    assert a.ids["calibration"] == a.ids["data"]


@pytest.mark.parametrize("name", sorted(path.stem for path in papers.BOARDS.glob("*.yaml")))
def test_no_data_set_takes_over_what_a_board_sets(name):
    """Stand-ins have settings in place of the paper's. Data that stand for nothing else leave a board its own."""
    for board, content in papers.suite(name).items():
        if "data" not in content or "paper" in lookup.dataset(content["data"]):
            continue
        for scale in content.get("scales", ()):
            own = lookup.dataset(content["data"]).get(scale, {}).get("settings", {})
            assert not {k for k, v in content.get("settings", {}).items() if own.get(k, v) != v}, (board, scale)


def test_a_fine_tuned_model_brings_its_base(trained):
    tuned = perplexity(trained, {"method": "dare"}, model="llama_code_tuned", data="source_code_dialect")
    assert tuned.ids["model"]["testbed"] == "code_lm_tuned" and tuned.ids["base"]["testbed"] == "code_lm"
    assert "base" not in perplexity(trained, {"method": "wanda"}).ids


def test_what_is_missing_is_named_all_at_once(monkeypatch, tmp_path):
    run = perplexity(SETTINGS, {"method": "wanda"}, "paper")
    for part in ("revision of huggyllama/llama-7b", "revision of ggml-org/ci", "revision of allenai/c4", "gives out"):
        assert part in run.needs
    monkeypatch.setattr(lookup, "_training", lambda testbed: tmp_path / "nothing")
    assert "the trained weights of the testbed code_lm " in perplexity(SETTINGS, {"method": "wanda"})
    assert planning.resolve(
        "zero_shot", "paper", SETTINGS, schema.Configuration(), model="mixtral_8x7b", settings={"tasks": ["boolq"]}
    ).needs.startswith("a pinned revision of mistralai")


@pytest.mark.parametrize("slug", ["wanda", "magnitude", "sparsegpt", "gblm", "flap"])
def test_every_perplexity_of_the_weight_papers_has_a_run(slug):
    found = [
        c for c in planning.cells(slug, SETTINGS) if c.reported.unit == "ppl" and "LLM-Pruner" not in c.reported.row
    ]
    for cell in found:
        run = cell.runs["paper"]
        assert isinstance(run, Run) and run.task == "perplexity" and cell.metric == "perplexity"
        assert run.ids["data"]["loader"] == "wikitext" and run.settings["length"] in (128, 2048, 4096)
    models = {cell.runs["paper"].ids["model"]["hub"] for cell in found}
    named = {cell.reported.column if slug != "gblm" else cell.reported.row.split(" ")[0] for cell in found}
    assert len(models) == len(named)  # every column or row its own checkpoint


def test_every_board_of_a_weight_paper_has_the_unpruned_model_and_chance_or_a_rival():
    for slug in ("wanda", "magnitude", "sparsegpt", "gblm", "flap", "cfsp", "amp", "easy_ep", "stun", "darex"):
        boards = papers.load(slug).boards
        assert {"perplexity", "accuracy"} <= {board.metric for board in boards}, slug
        assert all(len(board.entries) >= 2 for board in boards if board.task == "perplexity"), slug


def test_columns_may_be_settings_of_a_method():
    cells = {(c.reported.row, c.reported.column): c.runs["paper"] for c in planning.cells("mustafar", SETTINGS)}
    sparse, dense = cells["Mustafar (Llama-3-8B)", "K70 V0"], cells["Llama-3-8B dense", "K0 V0"]
    assert sparse.options == {"keys": 0.7, "values": 0.0} and dense.method is None
    assert sparse.ids["model"] == dense.ids["model"] and "licence" in sparse.needs
    assert len(sparse.settings["tasks"]) == len(sparse.settings["average"]) == 16


def test_an_asterisk_in_a_row_stands_for_any_text_and_a_table_knows_models_and_budgets_of_its_rows():
    table = schema.Table(
        name="t", models={"A-7B": "a", "B": "b"}, budget="0.5",
        rows={"*": "dense", "*Random": "random", "B-[1] Random": schema.Row(configuration="own", budget="0.2")},
    )  # fmt: skip
    found = [table.row(name) for name in ("A-7B Random", "B Full", "B-[1] Random", "C")]
    assert [row.configuration for row in found] == ["random", "dense", "own", "dense"]
    assert [row.model for row in found] == ["a", "b", "b", None]
    assert [row.budget for row in found] == ["0.5", "0.5", "0.2", "0.5"]
