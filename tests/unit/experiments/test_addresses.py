"""A record's address: everything that decides an outcome is in it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from prunelab.common import tasks
from prunelab.common.catalogue import lookup
from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.files import ROOT
from prunelab.common.experiments import planning, plans, provenance
from prunelab.common.experiments.run import Run

CODE = '''"""What it is."""
# A word on it.
import os  # of its own line


def f(x):
    """Add."""

    return """
# no comment

""" + x
'''


def test_words_decide_nothing_and_code_does():
    less = provenance.code(CODE)
    assert "What it is" not in less and "A word" not in less and "Add" not in less
    assert "# no comment\n\n" in less, "a string is code"
    assert provenance.code(CODE.replace("Add.", "Add two\n    texts.").replace("\n\n\n", "\n\n")) == less
    assert provenance.code(CODE.replace("+ x", "+ x + x")) != less
    assert provenance.code(CODE.replace("no comment", "one comment")) != less


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return plans.made({**lookup.settings({}), "assets": ""}).jobs()


@pytest.fixture
def edited(monkeypatch, runs) -> Callable[[str], list[Run]]:
    """The runs that another content of a file gives another address."""

    def change(name: str) -> list[Run]:
        path, known = ROOT / name, provenance.file_hash
        assert path.is_file()
        with monkeypatch.context() as patch:
            patch.setattr(provenance, "file_hash", lambda p: "another" if p == path else known(p))
            patch.setattr(provenance, "_sources", provenance._sources.__wrapped__)
            now: dict[tuple[str, ...], str] = {}
            for run in runs.values():
                if run.entries not in now:
                    now[run.entries] = provenance.sources(run.entries)[:12]
        return [run for run in runs.values() if now[run.entries] != run.sources]

    return change


@pytest.mark.parametrize(
    "silent",
    ["common/experiments/planning.py", "common/experiments/papers.py", "common/experiments/schema.py",
     "common/catalogue/schema.py", "common/catalogue/lookup.py", "common/cli/__init__.py", "common/core/errors.py",
     "common/core/registry.py",
     "prunelab/__init__.py", "common/drawing/svg.py", "paper_tables/join.py"],
)  # fmt: skip
def test_what_decides_nothing_changes_no_address(edited, silent):
    assert not edited(silent)


def on(*testbeds: str) -> Callable[[Run], bool]:
    return lambda run: any(isinstance(i, dict) and i.get("testbed") in testbeds for i in run.ids.values())


def built_by(backbone: str) -> Callable[[Run], bool]:
    def test(run: Run) -> bool:
        architecture = run.ids.get("model", {}).get("architecture", run.ids.get("model", {}))
        return architecture.get("library") == "backbones" and architecture["name"].startswith(f"{backbone}:")

    return test


@pytest.mark.parametrize(
    ("file", "test"),
    [
        ("common/testbeds/code_moe.py", on("code_moe")),
        ("common/testbeds/code_draft.py", on("code_draft")),
        ("common/testbeds/digits_detection.py", on("digits_detection")),
        ("common/testbeds/digits_film_qa.py", on("digits_film_qa")),
        ("common/testbeds/digits_video_qa.py", on("digits_video_qa", "digits_film_qa")),  # which goes on from it
        ("common/backbones/plain_mamba.py", built_by("plain_mamba")),
        ("methods/focus_detr/method.py", lambda r: r.method == "focus_detr" or on("digits_detection")(r)),
    ],
)
def test_what_builds_a_model_is_in_the_address_of_its_runs_alone(edited, runs, file, test):
    changed = edited(file)
    assert changed == [run for run in runs.values() if test(run)] and changed


def test_a_plan_is_made_once_and_anew_where_something_changed(tmp_path, monkeypatch):
    config = {**lookup.settings({"papers": "zero_tprune,lexrank"}), "assets": "", "results": str(tmp_path)}
    first = plans.of(config)
    assert first.slugs == ["zero_tprune", "lexrank"] and first.jobs()
    (path,) = (tmp_path / plans.FOLDER).iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(planning, "cells", None)  # nothing plans: the stored one is read
        again = plans.of(config)
    assert again.runs == first.runs and again.jobs() == first.jobs()
    assert all(run.address == address == replace(run).address for address, run in again.runs.items())
    for slug in again.slugs:
        assert again.cells(slug) == first.cells(slug) == list(planning.cells(slug, config))
        assert again.points(slug) == first.points(slug) == list(planning.points(slug, config))
        assert again.figures(slug) == first.figures(slug) == list(planning.figures(slug, config))
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(plans, "made", lambda config: made.append(config) or first)
        for change in (
            lambda: path.write_text("{"),
            lambda: path.write_text(path.read_text().replace("top1", "top5")),
            lambda: patch.setattr(lookup, "surroundings", lambda config: "another checkpoint is here"),
            lambda: patch.setattr(plans, "_read", lambda: "another method.py"),
        ):
            change()
            plans.of(config)
            plans.of(config)
    assert len(made) == 4, "once a change"
    assert plans.of({**config, "papers": "lexrank"}).slugs == ["lexrank"] and plans.of(config).runs == first.runs


def test_what_is_at_hand_enters_the_plan(tmp_path, monkeypatch):
    config = {**lookup.settings({}), "hub": str(tmp_path), "assets": str(tmp_path)}
    known = [lookup.surroundings(config)]
    for name in ("acme/model/weights.safetensors", "catalogue.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[]")
        known.append(lookup.surroundings(config))
    there = lookup.importlib.util.find_spec("lm_eval")
    monkeypatch.setattr(lookup.importlib.util, "find_spec", lambda name: None if there else object())
    known.append(lookup.surroundings(config))  # as the extra `evaluation` comes or goes
    assert all(a != b for a, b in pairwise(known))


def test_a_folder_that_can_only_be_read_needs_no_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(plans.files, "write_text", lambda *_: (_ for _ in ()).throw(PrunelabError("read-only")))
    config = {**lookup.settings({"papers": "lexrank"}), "results": str(tmp_path)}
    assert plans.of(config).jobs() == plans.made(config).jobs()


@pytest.mark.parametrize("task", ["zero_shot", "visual_tasks"])
def test_a_task_of_several_roles_reaches_the_wing_of_its_method_alone(task):
    wings = {"token_pruner": "tokens", "cache_pruner": "kv_cache", "weight_pruner": "weights"}
    methods = {
        "token_pruner": "fastv",
        "cache_pruner": "snapkv",
        "weight_pruner": "wanda",
        "ranker": "selective_context",
    }
    for role in (None, *tasks.get(task).roles):
        files = provenance.reached(planning.entries(task, methods.get(role or "")))
        rooms = {file.split("/")[1] for file in files} & set(wings.values())
        assert rooms == ({wings[role]} if role in wings else set())
        if role == "ranker":  # whose room the calibration of weights reaches, too
            assert "common/ranking/prompts.py" in files


TOKENS = {"act", "answer", "classify", "detect", "gallery", "looks", "macs", "prompt_macs", "segment"}
WEIGHTS = {"perplexity", "size"}
UNTRAINED = {"macs", "prompt_macs", "size", "function", "summarise", "subset"}  # tasks without a testbed


def of(*tasks: str) -> Callable[[Run], bool]:
    return lambda run: run.task in tasks


def every(run: Run) -> bool:
    return True


def never(run: Run) -> bool:
    return False


def made_by(*methods: str) -> Callable[[Run], bool]:
    return lambda run: run.method in methods


def prunes_tokens(run: Run) -> bool:
    """Tasks under token pruners, and those of them among the methods that prune caches."""
    return run.task in TOKENS or (run.method is not None and registry.entry(run.method).role == "token_pruner")


def scanning(run: Run) -> bool:
    """Runs on a vision Mamba; PlainMamba is built of Vim's parts."""
    testbed = run.ids.get("model", {}).get("testbed", "")
    return built_by("vim")(run) or built_by("plain_mamba")(run) or testbed.startswith("digits_vim")


def nowhere_else(file: str, run: Run) -> bool:
    """Whether a run reaches the file through a paper's own function, which no task declares."""
    return run.task == "function" and file in provenance.reached(run.entries)


@pytest.mark.parametrize(
    ("file", "test"),
    [  # one file of every room
        ("common/core/budget.py", every),
        ("common/backbones/vim.py", scanning),
        ("common/costs/meter.py", lambda r: r.task == "size" or prunes_tokens(r)),
        ("common/tokens/apply.py", prunes_tokens),
        ("common/kv_cache/apply.py", lambda r: r.task == "cache" or r.method == "dycoke"),
        ("common/weights/pruning.py", lambda r: of(*WEIGHTS, "tune", "generate")(r) or "cut" in r.settings),
        ("common/speculative/loop.py", of("decode")),
        ("common/constrained/smc.py", of("constrained")),
        ("common/ranking/sentences.py", of("summarise")),
        ("common/data_selection/role.py", of("tune", "subset")),
        ("common/experts/role.py", lambda r: r.method == "mc_moe" or "experts" in r.settings),
        ("common/data/detection.py", of("detect")),
        ("common/metrics/average_precision.py", of("detect")),
        ("common/apply.py", never),
        ("common/training/trainer.py", lambda r: r.task == "tune" or "parts" in r.ids),  # which a training made
        ("common/training/recipe.py", lambda r: r.task == "tune" or (r.task not in UNTRAINED and r.scale != "real")),
        ("common/testbeds/__init__.py", lambda r: r.task not in UNTRAINED and r.scale != "real"),
        ("common/models/batching.py", of("classify", "perplexity")),
        ("common/measures/cache.py", of("cache")),
        ("common/tasks/decode.py", of("decode")),
        ("common/catalogue/hub.py", never),
        ("common/experiments/runner.py", never),
        ("common/drawing/sheets.py", never),
        ("common/cli/runs.py", never),
        ("methods/tome/method.py", made_by("tome")),
        ("methods/fastv/tables.py", of()),
        ("paper_tables/join.py", never),
    ],
)  # fmt: skip
def test_an_edit_in_a_room_remakes_the_runs_that_it_decides(edited, runs, file, test):
    assert edited(file) == [run for run in runs.values() if test(run) or nowhere_else(file, run)]
