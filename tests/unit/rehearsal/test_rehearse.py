"""Rehearsals: runs at paper scale on look-alikes, through the code that a GPU runs."""

from __future__ import annotations

import importlib
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from prunelab.common.backbones import checkpoint, segvit
from prunelab.common.catalogue import lookup
from prunelab.common.core import registry
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import captions, detection, documents, segmentation, videos
from prunelab.common.experiments import plans, runner, workspace
from prunelab.common.models import loading
from prunelab.common.rehearsal import checkpoints, datasets, rehearse


@pytest.fixture(scope="module")
def plan() -> plans.Plan:
    return plans.made(lookup.settings({"papers": "wanda,zero_tprune,hiprune", "scale": "paper"}))


def named(plan: plans.Plan, *parts: str) -> rehearse.Combination:
    return next(c for c in rehearse.combinations(plan.runs.values()) if all(part in c.name for part in parts))


def test_combinations_hold_every_run_once_and_the_most_unlike_come_first(plan: plans.Plan) -> None:
    found = rehearse.combinations(plan.runs.values())
    whole = [run for run in plan.runs.values() if run.scale == "paper" and run.names]
    assert sum(c.runs for c in found) == len(whole) > len(found) > 10
    assert len({c.name for c in found}) == len(found)
    first = found[: len(found) // 2]
    assert {c.run.method for c in first} == {c.run.method for c in found}
    assert {str(c.run.settings.get("tasks")) for c in first} == {str(c.run.settings.get("tasks")) for c in found}


def test_a_cut_run_is_short_and_otherwise_itself(plan: plans.Plan) -> None:
    run = named(plan, "perplexity", "wanda").run
    short = rehearse.cut(run)
    assert short.settings["length"] == 64 and short.settings["samples"] == 2 and short.settings["calibration"] == 2
    assert (short.method, short.budget, short.options, short.ids) == (run.method, run.budget, run.options, run.ids)


def test_runs_of_an_evaluation_library_are_joined_where_only_its_tasks_differ(plan: plans.Plan) -> None:
    found = [c for c in rehearse.combinations(plan.runs.values()) if c.run.task == "visual_tasks"]
    groups = rehearse.groups(found)
    assert [c.name for group in groups for c in group] and sum(map(len, groups)) == len(found) > 2 * len(groups)
    group = max(groups, key=len)
    whole = rehearse.joined(group)
    for each in group:
        assert set(each.run.settings["tasks"]) <= set(whole.run.settings["tasks"])
        assert set(each.run.names) - set(whole.run.names) <= {n for n in each.run.names if n[0] == "model"}
        assert {k for k in each.run.ids if k.startswith("data of ")} <= set(whole.run.ids)
    assert rehearse.joined(group[:1]) is group[0]


def test_a_group_that_fails_is_tried_one_by_one(
    plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [c for c in rehearse.combinations(plan.runs.values()) if c.run.task == "visual_tasks"]
    group = max(rehearse.groups(found), key=len)[:3]
    bad = set(group[1].run.settings["tasks"]) - set(group[0].run.settings["tasks"])

    def measure(run: Any, config: Any) -> None:
        if bad & set(run.settings["tasks"]):
            raise SystemExit("no such video")

    monkeypatch.setattr(runner, "measure", measure)
    monkeypatch.setattr(rehearse.LookAlikes, "prepare", lambda self, run: run)
    outcomes = rehearse.together(group, rehearse.LookAlikes(tmp_path, plan.config))
    assert [o.name for o in outcomes] == [each.name for each in group]
    assert not outcomes[0].fault and outcomes[1].fault == "SystemExit: no such video"


@pytest.mark.parametrize("parts", [("perplexity", "wanda"), ("classify", "zero_tprune")])
def test_rehearsals_pass_through_the_code_of_a_gpu(parts: tuple[str, ...], plan: plans.Plan, tmp_path: Path) -> None:
    combination = named(plan, *parts)
    outcome = rehearse.rehearse(combination, rehearse.LookAlikes(tmp_path, plan.config))
    assert (outcome.fault, outcome.skipped) == ("", False), (tmp_path / "rehearsals.log").read_text()
    assert combination.name in (tmp_path / "rehearsals.log").read_text()


def test_a_fault_is_named_and_its_traceback_kept(
    plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Any:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(runner, "measure", fails)
    outcome = rehearse.rehearse(named(plan, "perplexity", "wanda"), rehearse.LookAlikes(tmp_path, plan.config))
    assert outcome.fault == "ZeroDivisionError: by nothing" and not outcome.skipped
    assert "Traceback" in (tmp_path / "rehearsals.log").read_text()
    told = list(rehearse.summary([outcome]))
    assert told[0] == "0 of 1 rehearsals passed, 1 failed, 0 were not held" and "by nothing" in told[1]


def test_what_has_no_look_alike_is_not_held_and_says_so(
    plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "FILES", {})
    outcome = rehearse.rehearse(named(plan, "perplexity", "wanda"), rehearse.LookAlikes(tmp_path, plan.config))
    assert outcome.skipped and "no look-alike of the data set wikitext2" in outcome.fault


def test_outcomes_are_noted(plan: plans.Plan, tmp_path: Path) -> None:
    config = {**plan.config, "papers": "wanda", "results": str(tmp_path / "results")}
    outcomes = rehearse.run(config, tmp_path / "folder", sample=1)
    noted = json.loads((tmp_path / "results" / workspace.REHEARSALS).read_text())
    assert [o["name"] for o in noted] == [o.name for o in outcomes] and len(outcomes) == 1
    assert not outcomes[0].fault and rehearse.run(config, tmp_path / "other", sample=1) == outcomes
    assert not (tmp_path / "other" / "rehearsals.log").exists(), "what passed is not run again"
    rehearse.run({**config, "papers": "lexrank"}, tmp_path / "folder", sample=1)
    noted = json.loads((tmp_path / "results" / workspace.REHEARSALS).read_text())
    assert outcomes[0].name in [o["name"] for o in noted] and len(noted) == 2, "what other papers passed stays"


def test_narrow_models_keep_layers_and_pictures_and_their_ratio_of_heads() -> None:
    whole = lookup.architecture("qwen2_5_vl_7b")["arguments"]
    found = checkpoints.narrow(whole)
    for part in ("vision_config", "text_config"):
        for key in ("num_hidden_layers", "depth", "patch_size"):
            assert found[part].get(key) == whole[part].get(key)
    assert (found["vision_config"]["num_heads"], whole["vision_config"]["num_heads"]) == (checkpoints.SEEING, 16)
    heads = ("num_attention_heads", "num_key_value_heads")
    assert [(whole["text_config"][key], found["text_config"][key]) for key in heads] == [(28, 7), (4, 1)]
    alone = lookup.architecture("llama2_13b")["arguments"]
    assert checkpoints.narrow(alone)["num_attention_heads"] == alone["num_attention_heads"] == 40
    assert found["text_config"]["hidden_size"] < whole["text_config"]["hidden_size"] / 10
    assert sum(found["text_config"]["rope_parameters"]["mrope_section"]) == 4, "half of a head's eight channels"


def test_a_set_that_is_described_anew_is_made_anew(plan: plans.Plan, tmp_path: Path, monkeypatch: Any) -> None:
    written: list[str] = []

    def parts(hub: str, folder: Path) -> None:
        (folder / "told").write_text(str(datasets.described()[hub]))
        written.append(hub)

    monkeypatch.setattr(datasets, "parts", parts)
    made = rehearse.LookAlikes(tmp_path, plan.config)
    (tmp_path / "cache").mkdir()
    made.make("dataset", "piqa")
    made.make("dataset", "piqa")
    assert written == ["baber/piqa"] and (tmp_path / "cache").exists()
    monkeypatch.setattr(datasets, "described", lambda: {"baber/piqa": {"parts": {}}})
    made.make("dataset", "piqa")
    assert len(written) == 2 and not (tmp_path / "cache").exists()
    assert (tmp_path / "hub" / "baber" / "piqa" / "told").read_text() == "{'parts': {}}"


def test_described_sets_have_the_names_the_catalogue_reads() -> None:
    read = {entry["paper"]["hub"] for entry in lookup.datasets().values() if "hub" in entry.get("paper", {})}
    assert set(datasets.described()) <= read
    for described in datasets.described().values():
        for part in described["parts"].values():
            row = {name: datasets.value(column, 1) for name, column in part["columns"].items()}
            assert part["splits"] and all(value is not None for value in row.values())


def test_archives_hold_a_film_or_pictures_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    datasets._pack(tmp_path / "films.zip", {f"/{i}.mp4": datasets._film() for i in range(2)})
    datasets._pack(tmp_path / "films.tar.part.aa", {"videos/0.mp4": datasets._film()})
    with zipfile.ZipFile(tmp_path / "films.zip") as packed:
        packed.extractall(tmp_path / "own")
    with tarfile.open(tmp_path / "films.tar.part.aa") as archive:
        assert archive.getnames() == ["videos/0.mp4"]
    assert videos.frames(tmp_path / "own" / "1.mp4", 4).shape == (4, 224, 224, 3)


def test_look_alikes_of_folders_are_read_by_their_readers(tmp_path: Path) -> None:
    for loader, layout in segmentation.LAYOUTS.items():
        datasets.FOLDERS[loader](tmp_path / loader)
        image, marks = segmentation.files(tmp_path / loader, layout)[0]
        assert segmentation.read(image, marks, (2048, 512), "half")[1].max() >= 3
    for name in ("coco", "coco_captions_train"):
        entry = lookup.dataset(name)["paper"]
        datasets.ENTRIES[entry["loader"]](tmp_path / "coco", entry)
    entry = lookup.dataset("coco")["paper"]
    collection = detection.coco(entry, {"coco": str(tmp_path / "coco")})
    assert len(collection.objects) == 32 and len(collection.classes) == 80
    assert collection.image(0).dim() == 3
    entry = lookup.dataset("coco_captions_train")["paper"]
    assert captions.drawn(entry, {"coco": str(tmp_path / "coco")}, 3, 0)[0].of.exists()
    datasets.captions(tmp_path / "captions")
    entry = lookup.dataset("laion_coco_captions")["paper"]
    assert len(captions.drawn(entry, {"captions": str(tmp_path / "captions")}, 100, 0)) == 100
    datasets.duc(tmp_path / "duc")
    found = documents.duc(tmp_path / "duc")
    assert len(found) == datasets.ROWS and len(found[0].references) == 2 and len(found[0].documents[0]) >= 8


def test_a_segmenter_is_kept_under_its_authors_names(tmp_path: Path) -> None:
    tiny = {"classes": 3, "window": 32, "width": 16, "depth": 2, "heads": 2, "stages": [0, 1], "head_width": 12}
    identity = {"architecture": {"library": "backbones", "name": "segvit:segmenter", "arguments": tiny}}
    checkpoints.official(identity, tmp_path / "segmenter.safetensors")
    names = set(segvit.read(tmp_path / "segmenter.safetensors"))
    assert {"backbone.cls_token", "backbone.layers.1.ln1.weight", "decode_head.q.weight"} <= names


def test_learned_parts_fit_the_look_alike_of_their_model(tmp_path: Path) -> None:
    architecture = lookup.architecture("vicuna_7b")
    checkpoints.transformers_model(architecture, tmp_path / "like", seen=False)
    method = registry.get("medusa")(tree=((0,), (0, 0)))
    checkpoints.learned_parts(method, tmp_path / "like", tmp_path / "heads.pt")
    width = checkpoints.narrow(architecture["arguments"])["hidden_size"]
    assert checkpoint.read(tmp_path / "heads.pt")["0.1.weight"].shape == (checkpoints.VOCABULARY, width)


def test_a_model_of_a_backbone_of_our_own_is_loaded_by_its_class(tmp_path: Path) -> None:
    checkpoints.own_model(lookup.architecture("baichuan2_13b"), tmp_path / "baichuan")
    model, words = loading.language({"folder": str(tmp_path / "baichuan")}, {})
    assert type(model).__name__ == "BaichuanForCausalLM" and model.config.num_hidden_layers == 40
    assert model.config.hidden_size == 160 and len(words("the river")["input_ids"]) == 2


@pytest.mark.parametrize("name", ["clip_vit_b32", "clip_vit_l_336"])
def test_a_clip_model_compares_pictures_and_words(name: str, tmp_path: Path) -> None:
    checkpoints.transformers_model(lookup.architecture(name), tmp_path / "clip", seen=True)
    model, sees = loading.clip({"folder": str(tmp_path / "clip")}, {})
    read = sees(text=["river " * 99], images=[datasets._picture(0)], return_tensors="pt", truncation=True)
    assert read["input_ids"].shape == (1, 77) and model(**read).logits_per_image.isfinite().all()


def test_what_a_look_alike_fails_with_is_a_fault(
    plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Any:
        raise IsADirectoryError("data")

    monkeypatch.setattr(rehearse.LookAlikes, "prepare", fails)
    made = rehearse.LookAlikes(tmp_path, plan.config)
    outcome = rehearse.together([named(plan, "perplexity", "wanda")], made)[0]
    assert outcome.fault == "its look-alike: IsADirectoryError: data" and not outcome.skipped


def test_an_unknown_processor_is_named() -> None:
    with pytest.raises(PrunelabError, match="processor of Strange"):
        checkpoints.processor("Strange", lookup and type("Config", (), {"vision_config": object()})())


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PrunelabError, match=r"pip install -e .*evaluation"):
        datasets.parts("lmms-lab-encoder/GQA", tmp_path)


@pytest.mark.parametrize("layout", ["llava_layout", "pllava"])
def test_published_names_of_a_layout_are_those_that_it_reads(layout: str) -> None:
    module = importlib.import_module(f"prunelab.common.backbones.{layout}")
    names = [
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.language_model.layers.1.self_attn.q_proj.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        *(["model.image_newline"] if layout == "llava_layout" else []),
    ]
    told = [checkpoints.published(name, module.NAMES) for name in names]
    assert [module.official_name(name) for name in told] == names and told[0] != names[0]
