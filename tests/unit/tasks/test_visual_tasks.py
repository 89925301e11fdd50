"""Visual tasks: lmms-eval asks our models, pruned or not. Tiny random checkpoints in hub layout and a task of our own,
with images and videos made on the fly; what the library's own wrapper of these models finds is the measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipModel

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import papers, provenance, runner, schema
from prunelab.common.experiments.run import Run
from prunelab.common.measures import text_similarity, visual_tasks
from prunelab.common.measures.lmms_tasks import rules
from prunelab.common.measures.scores import OWN, SCALED, SUMS, relative
from prunelab.common.tasks.visual_tasks import VisualTasks
from prunelab.paper_tables.tolerance import MEANS
from tests.contract.clips import tiny_clip
from tests.contract.vlms import IMAGE, VIDEO, VOCABULARY, vlm

TEMPLATE = (
    "{% for message in messages %}user {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}answer {% endif %}"
)
# A task that scores an answer by a checksum, so that no answer can change without the score.
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scoring.visual
doc_to_text: !function scoring.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
process_results: !function scoring.process
metric_list:
  - {{metric: score, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
lmms_eval_specific_kwargs: {{default: {{post_prompt: ""}}}}
"""
SCORING = """\
import zlib
from PIL import Image

def visual(doc):
    if doc["kind"] == "video":
        return doc["files"]
    return [Image.open(path).convert("RGB") for path in doc["files"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + lmms_eval_specific_kwargs["post_prompt"]

def process(doc, results):
    return {"score": zlib.crc32(results[0].encode()) % 1000 / 1000}
"""


def checkpoint(folder: Path, family: str) -> Path:
    """A tiny random model with its processor, saved as a hub repository lies on disk."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE, "<video>": VIDEO}
    words |= {f"w{i}": i for i in range(VOCABULARY) if i not in words.values()}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )  # fmt: skip
    if family == "llava":
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        processor = t.LlavaProcessor(
            t.CLIPImageProcessor(**size), tokenizer, patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=TEMPLATE,
        )  # fmt: skip
    else:
        size = {"size": {"height": 24, "width": 24}}
        grid = [[24, 48], [48, 24], [48, 48]]
        processor = t.LlavaOnevisionProcessor(
            t.LlavaOnevisionImageProcessor(**size, image_grid_pinpoints=grid), tokenizer,
            t.LlavaOnevisionVideoProcessor(**size), num_image_tokens=9, vision_feature_select_strategy="full",
            chat_template=TEMPLATE,
        )  # fmt: skip
    model = vlm(family)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def film(path: Path, frames: int, seed: int) -> None:
    """A small video of plain colours, whose frames decode alike everywhere."""
    import av

    colours = np.random.default_rng(seed).integers(0, 256, (frames, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for colour in colours:
            picture = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (32, 32, 3)).copy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks `pictures`, `films`, `mixed` (no, one and two images), `broken`, and a group."""
    pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed (the extra `evaluation`)")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "scoring.py").write_text(SCORING)
    random = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"pictures": [], "films": [], "mixed": [], "broken": []}
    for number in range(6):
        picture, video = folder / f"{number}.png", folder / f"{number}.mp4"
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture)
        film(video, 9 + number, number)
        question = " ".join(f"w{word}" for word in random.integers(10, 50, 3 + number % 3))
        common = {"question": question, "answer": "w7"}
        rows["pictures"].append({**common, "kind": "image", "files": [str(picture)]})
        rows["films"].append({**common, "kind": "video", "files": [str(video)]})
        shown = [str(picture)] * (number % 3)  # none, one, or one twice
        rows["mixed"].append({**common, "kind": "image", "files": shown})
    rows["broken"].append({**rows["films"][0], "files": [str(folder / "scoring.py")]})
    (folder / "both.yaml").write_text("group: both\ntask: [pictures, mixed]\n")
    for name, entries in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name).replace(f" {name}.jsonl", f" {folder}/{name}.jsonl")
        )
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("onevision"), "llava_onevision")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)  # the library writes a file or two where it stands


def run(model, tasks, names, method=None, budget=None, options=(), **settings):
    settings = {"tasks": names, "include": str(tasks), "frames": 4, **settings}
    return Run("visual_tasks", "paper", method, dict(options), budget, settings, {"model": {"folder": str(model)}})


def own(model, tasks, name, simple, **arguments):
    """What the library's runner finds through its own wrapper of these models."""
    import lmms_eval.evaluator

    given = ",".join(
        f"{key}={value}"
        for key, value in {"pretrained": model, "device": "cpu", "device_map": "cpu", **arguments}.items()
    )
    found = lmms_eval.evaluator.simple_evaluate(
        model="llava_hf", model_args=given, tasks=[name], task_manager=visual_tasks.index(str(tasks)),
        force_simple=simple, batch_size=1, log_samples=False,
    )  # fmt: skip
    return found["results"][name]["score,none"]


def test_images_give_the_librarys_own_number(llava, tasks):
    found = runner.measure(run(llava, tasks, ["pictures"]), {})["pictures score"]
    assert found["value"] == pytest.approx(100 * own(llava, tasks, "pictures", simple=False), abs=1e-3)
    assert found["value"] == pytest.approx(100 * own(llava, tasks, "pictures", simple=True), abs=1e-3)
    assert found["samples"] == 6 and found["stderr"] > 0
    assert found["protocol"].startswith("lmms-eval ") and "pictures 1.5" in found["protocol"]


def test_a_task_that_has_no_words_to_change_is_left_alone():
    pytest.importorskip("lmms_eval")
    found = {e["task"]: e for e in visual_tasks.definitions(["textvqa_val", "seedbench"], None, {"ocr": True})[0]}
    assert found["textvqa_val"]["lmms_eval_specific_kwargs"]["default"]["ocr"] is True
    assert not found["seedbench"].get("lmms_eval_specific_kwargs")


def test_what_a_task_scores_by_is_asked_for_before_work_starts(monkeypatch):
    monkeypatch.setattr(visual_tasks, "SCORERS", {"nextqa_oe": "no_such_library"})
    visual_tasks.check_scorers(["gqa"])
    with pytest.raises(PrunelabError, match="pip install no_such_library"):
        visual_tasks.check_scorers(["gqa", "nextqa_oe_test"])


def test_answers_hold_nothing_that_a_worksheet_refuses():
    pytest.importorskip("lmms_eval")
    openpyxl = pytest.importorskip("openpyxl.cell.cell")
    from prunelab.common.measures.lmms_model import UNPRINTABLE

    for code in range(0x110):
        kept = UNPRINTABLE.sub("", chr(code))
        assert (kept == "") == bool(openpyxl.ILLEGAL_CHARACTERS_RE.search(chr(code)))


def test_videos_give_the_librarys_own_number(onevision, tasks):
    pytest.importorskip("decord", reason="the library's wrapper decodes with decord")
    found = runner.measure(run(onevision, tasks, ["films"]), {})["films score"]
    assert found["value"] == pytest.approx(
        100 * own(onevision, tasks, "films", simple=True, max_frames_num=4), abs=1e-3
    )


def test_batches_of_all_kinds_of_questions_answer_as_alone(llava, tasks):
    alone, together = (runner.measure(run(llava, tasks, ["both"], batch=b), {}) for b in (1, 4))
    assert alone.pop("seconds")["value"] > 0 < together.pop("seconds")["value"]
    assert alone.pop("rate")["value"] > 0 < together.pop("rate")["value"]
    assert alone == together
    parts = [alone[f"{task} score"] for task in ("pictures", "mixed")]
    assert parts[0]["value"] != parts[1]["value"]
    assert alone["both score"]["value"] == pytest.approx(sum(p["value"] for p in parts) / 2, abs=1e-3)
    assert alone["both score"]["samples"] == 12


@pytest.mark.parametrize(("method", "options"), [("fastv", {"layer": 2}), ("divprune", {})])
def test_a_method_that_keeps_all_changes_nothing_and_one_that_prunes_does(llava, tasks, method, options):
    whole, full, less = (
        runner.measure(run(llava, tasks, ["pictures"], *pruned, batch=3), {})
        for pruned in ((), (method, "1.0", options), (method, "0.25", options))
    )
    assert whole["pictures score"]["value"] == full["pictures score"]["value"] != less["pictures score"]["value"]
    assert "kept" not in whole and full["kept"]["value"] == 100
    layers = vlm("llava").config.text_config.num_hidden_layers
    before = options.get("layer", 0) / layers  # layers that see all
    assert less["kept"]["value"] == pytest.approx(100 * (before + 0.25 * (1 - before)), abs=1)
    assert f"visual tokens ({less['kept']['value']:.1f} %)" in less["pictures score"]["protocol"]


def test_videos_are_pruned_and_sampled_as_asked(onevision, tasks):
    def score(*pruned, frames=4):
        asked = run(onevision, tasks, ["films"], *pruned, frames=frames, limit=3)
        return runner.measure(asked, {})["films score"]

    assert score()["value"] == score("divprune", "1.0")["value"] != score("divprune", "0.3")["value"]
    assert score()["value"] != score(frames=2)["value"]
    assert score()["samples"] == 3


def test_a_task_of_the_library_reads_the_folder_that_stands_in_for_its_data(llava, tasks, tmp_path):
    import datasets

    place = tmp_path / "lmms-lab-encoder" / "POPE"
    place.mkdir(parents=True)
    rows = [
        {"question_id": str(n), "question": "w5 w6", "answer": ("yes", "no")[n % 2], "image": str(tasks / f"{n}.png")}
        for n in range(4)
    ]
    read = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    read.to_parquet(place / "test.parquet")
    asked = run(llava, tasks, ["pope"])
    asked.ids["data of pope"] = {"hub": "lmms-lab-encoder/POPE", "local": "0"}
    found = runner.measure(asked, {"hub": str(tmp_path)})
    assert found["pope pope_accuracy"]["samples"] == 4 and found["pope pope_accuracy"]["value"] == 0
    assert found["pope pope_yes_ratio"]["value"] == 0.5


def test_prompts_change_where_a_task_lets_them(llava, tasks):
    changed = runner.measure(run(llava, tasks, ["pictures"], prompts={"post_prompt": " w9 w11"}), {})
    assert changed["pictures score"]["value"] != runner.measure(run(llava, tasks, ["pictures"]), {})[
        "pictures score"]["value"]  # fmt: skip
    assert "post_prompt= w9 w11" in changed["pictures score"]["protocol"]
    with pytest.raises(PrunelabError, match="have post_prompt to change, not ocr"):
        runner.measure(run(llava, tasks, ["pictures"], prompts={"ocr": True}), {})


def test_prompts_of_several_tasks_change_where_they_have_what_changes(tasks):
    read, _ = visual_tasks.definitions(["gqa", "textvqa_val"], None, {"ocr": True})
    gqa, textvqa = (entry["lmms_eval_specific_kwargs"]["default"] for entry in read)
    assert "ocr" not in gqa and textvqa["ocr"] is True


OURS = {  # our own tasks: repository, split, a row as the repository has it, and what an answer scores
    "mmvet_rule": (
        "lmms-lab-encoder/MMVet", "test", {"question_id": "v1", "question": "w5 w6", "answer": "w7<AND>w8"}),
    "llava_in_the_wild_rule": (
        "lmms-lab-encoder/llava-bench-in-the-wild", "train",
        {"question": "w5", "gpt_answer": "w7 w8 w9", "category": "conv"}),
    "a_okvqa_val": (
        "HuggingFaceM4/A-OKVQA", "validation",
        {"question": "w5", "choices": ["w7", "w8", "w9", "w10"], "correct_choice_idx": 2}),
    "vqav2_val": (
        "lmms-lab-encoder/VQAv2", "validation",
        {"question": "w5", "question_id": 1, "answer": "w7", "answers": [{"answer": "w7"}] * 10}),
    "mmbench_cn_dev_rule": (
        "lmms-lab-encoder/MMBench", "dev",
        {"index": 1, "question": "w5", "hint": "nan", "answer": "B", "A": "w7", "B": "w8", "C": "nan", "D": "nan",
         "category": "c", "source": "s", "L2-category": "l", "comment": "nan", "split": "dev"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_own_tasks_and_those_of_other_splits_run_pruned_on_look_alikes_of_their_data(llava, tasks, tmp_path, name):
    import datasets

    hub, split, row = OURS[name]
    place = tmp_path / hub
    place.mkdir(parents=True)
    if name.startswith("mmbench"):
        (place / "README.md").write_text(
            "---\nconfigs:\n- config_name: cn\n  data_files: [{split: dev, path: '*.parquet'}]\n---\n"
        )
    rows = [{**row, "image": str(tasks / f"{n}.png")} | ({"index": n} if "index" in row else {}) for n in range(3)]
    read = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    read.to_parquet(place / f"{split}-00000-of-00001.parquet")
    asked = run(llava, tasks, [name], "divprune", "0.5")
    asked.ids["data of it"] = {"hub": hub, "local": "0"}
    found = runner.measure(asked, {"hub": str(tmp_path)})
    (scored,) = {key: value for key, value in found.items() if key.startswith(name)}.values()
    assert scored["samples"] == 3 and 0 <= scored["value"] <= 100 and found["seconds"]["value"] > 0


def test_questions_about_videos_in_a_readers_folder_run_on_its_look_alike(onevision, tasks, tmp_path):
    from prunelab.common.rehearsal.datasets import films

    entry = lookup.dataset("msrvtt_qa")["paper"]
    films(tmp_path / entry["file"], entry)
    asked = run(onevision, tasks, ["msrvtt_qa_rule"], "divprune", "0.5", limit=3)
    asked.ids["data of it"] = entry
    found = runner.measure(asked, {entry["setting"]: str(tmp_path)})
    share, points = (found[f"msrvtt_qa_rule {metric}"] for metric in ("rule_score", "rule_points"))
    assert share["samples"] == 3 and points["value"] == pytest.approx(share["value"] / 20)
    (tmp_path / entry["file"] / entry["videos"] / "v1.mp4").unlink()
    with pytest.raises(PrunelabError, match="holds no video v1"):
        runner.measure(asked, {entry["setting"]: str(tmp_path)})
    (tmp_path / entry["file"] / "test_a.json").write_text("[]")
    with pytest.raises(PrunelabError, match="6 questions and 0 answers"):
        runner.measure(asked, {entry["setting"]: str(tmp_path)})


def test_frames_are_weighed_by_a_model_of_images_for_the_question(llava, onevision, tasks, monkeypatch):
    asked = run(onevision, tasks, ["films"], "quota", "12count", {"weighting": "query"}, limit=3)
    asked.ids["frame_scores"] = {"folder": str(llava)}
    found = runner.measure(asked, {})["films score"]
    even = runner.measure(run(onevision, tasks, ["films"], "quota", "12count", {"weighting": "even"}, limit=3), {})
    assert found["samples"] == 3 and found["value"] != even["films score"]["value"]
    assert "the question itself" in found["protocol"]
    told = []
    monkeypatch.setattr(
        visual_tasks.frame_scoring, "decouple", lambda question, speak: told.append(question) or ("w9",)
    )
    asked.settings.update(decouple=True, hourly=3600)
    more = runner.measure(asked, {})["films score"]
    assert len(told) == 3 and all(question.startswith("w") for question in told)
    assert "which the model asked names" in more["protocol"] and "3600 more an hour" in more["protocol"]


def test_patches_are_compared_with_the_question_by_a_text_tower(llava, tasks, tmp_path):
    questions: list[list[str]] = []

    class Watched(text_similarity.TextTower):
        def __call__(self, asked):
            questions.append(list(asked))
            return super().__call__(asked)

    tiny_clip(tmp_path / "clip", [f"w{n}" for n in range(60)], width=24)
    method = "recoverable_compression", "1"
    asked = run(llava, tasks, ["both"], *method, batch=4)
    asked.ids["text_tower"] = {"folder": str(tmp_path / "clip")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visual_tasks, "TextTower", Watched)
        together = runner.measure(asked, {})
    assert "by CLIP's text tower" in together["pictures score"]["protocol"] and 0 < together["kept"]["value"] < 100
    assert max(map(len, questions)) > 1 and all(text.startswith("w") for texts in questions for text in texts)
    asked.settings["batch"] = 1
    assert runner.measure(asked, {})["pictures score"]["value"] == together["pictures score"]["value"]
    with pytest.raises(PrunelabError, match="text_similarity"):
        runner.measure(run(llava, tasks, ["pictures"], *method), {})


def test_frames_are_described_by_a_pooling_head_of_another_repository(onevision, tasks, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision, text = sizes | {"image_size": 24, "patch_size": 8}, sizes | {"vocab_size": 32}
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path)
    asked = run(onevision, tasks, ["films"], "fastvid", "0.5", {"frames": "head"}, limit=3)
    asked.ids["pooling_head"] = {"folder": str(tmp_path)}
    found = runner.measure(asked, {})["films score"]
    assert found["samples"] == 3 and "pooling head of SigLIP's own repository" in found["protocol"]
    with pytest.raises(PrunelabError, match="pooling_head"):
        runner.measure(run(onevision, tasks, ["films"], "fastvid", "0.5", {"frames": "head"}, limit=3), {})


def test_what_cannot_be_asked_is_refused(llava, onevision, tasks):
    with pytest.raises(PrunelabError, match="takes images only"):
        runner.measure(run(llava, tasks, ["films"]), {})
    with pytest.raises(PrunelabError, match="cannot be decoded"):
        runner.measure(run(onevision, tasks, ["broken"]), {})
    with pytest.raises(PrunelabError, match="no task 'nobody'"):
        runner.measure(run(llava, tasks, ["nobody"]), {})
    with pytest.raises(PrunelabError, match="cannot hold the 32 first and last tokens"):
        runner.measure(run(llava, tasks, ["pictures"], "snapkv", "0.5"), {})
    with pytest.raises(PrunelabError, match="wanda is a weight_pruner"):
        runner.measure(run(llava, tasks, ["pictures"], "wanda", "0.5"), {})


def test_every_task_that_a_paper_names_is_one_of_the_librarys(tasks):
    """Its metrics, too, and the catalogue names the repository that it reads."""
    from lmms_eval.utils import load_yaml_config

    index = visual_tasks.index(str(tasks)).task_index
    for column in columns():
        for name in column.settings["tasks"]:
            assert name in index, name
            read = load_yaml_config(index[name]["yaml_path"], mode="full")
            leaf = read if isinstance(read["task"], str) else load_yaml_config(
                index[read["task"][0]]["yaml_path"], mode="full"
            )  # fmt: skip
            metrics = {entry["metric"].strip() for entry in leaf["metric_list"]}
            shown = {m.split(" ")[1].split(",")[0] for m in asked(column) if m.split(" ")[0] == name}
            shown = {SCALED[metric][0] if metric in SCALED else metric for metric in shown}
            assert {part for metric in shown for part in SUMS.get(metric, (metric,))} <= metrics, name
            (data,) = lookup.of_tasks([name])
            paper = lookup.dataset(data)["paper"]
            assert paper.get("hub", paper.get("file")) == leaf["dataset_path"], name


# -- what needs no lmms-eval -------------------------------------------------------------------------------------------


def test_rules_score_answers_as_they_say():
    assert rules.words("The 3.5 Cats, -1!") == ["3.5", "cats", "-1"]
    assert rules.agreement("x is -1 or -5", "-1<AND>-5") == 1.0 != rules.agreement("x is 1", "-1<AND>-5")
    assert rules.agreement("x is -1", "-1<AND>-5") == 0.5
    assert rules.agreement("it is a cat", "dog<OR>the cat") == 1.0
    assert rules.agreement("concatenate", "cat") == 0.0  # words, not letters
    long = "a man stands on the back of a yellow taxi in the street"
    assert rules.agreement(long, long) == 1.0 > rules.agreement("a man stands in the street", long) > 0.0
    options = {"A": "red car", "B": "blue boat"}
    assert [rules.choice(answer, options) for answer in ("B.", "(A) red car", "a blue boat", "Both", "")] == [
        "B", "A", "B", "", ""]  # fmt: skip


def test_definitions_of_ours_count_among_the_sources_of_their_runs_alone():
    files = VisualTasks.files({"tasks": ("gqa", "mmvet_rule")})
    assert files == (f"{OWN}/mmvet_rule.yaml", f"{OWN}/mmvet.py")
    assert VisualTasks.files({"tasks": ("gqa",)}) == ()
    assert f"{OWN}/rules.py" in provenance.reached(files)


RESULTS = {  # as the library gives them: a name of the task among metrics, errors that may be text, paths of files
    "gqa": {"alias": "gqa", "exact_match,none": 0.625, "exact_match_stderr,none": 0.02},
    "pope": {"pope_f1_score,none": 0.75, "pope_f1_score_stderr,none": "N/A", "pope_f1_score_stderr_clt,none": 0.1,
             "pope_accuracy,none": 0.5, "pope_accuracy_stderr,none": "N/A", "pope_accuracy_stderr_clt,none": 0.1},
    "mme": {"mme_perception_score,none": 1500.5, "mme_perception_score_stderr,none": "N/A",
            "mme_cognition_score,none": 300.25},
    "egoschema": {"submission,none": "/some/file.json", "submission_stderr,none": "N/A"},
    "nocaps_val": {"nocaps_CIDEr,none": 1.055, "nocaps_CIDEr_stderr,none": "N/A"},
    "videomme": {"videomme_perception_score,none": 58.25, "videomme_perception_score_stderr,none": "N/A"},
}  # fmt: skip


def test_shares_are_told_as_percent_and_points_as_points():
    found = visual_tasks.percentages(RESULTS, dict.fromkeys(RESULTS, 100))
    assert found["gqa exact_match"] == {"value": 62.5, "samples": 100, "stderr": 2.0}
    assert found["pope pope_f1_score"] == {"value": 75.0, "samples": 100}  # the library's error is of the accuracy
    assert found["pope pope_accuracy"] == {"value": 50.0, "samples": 100, "stderr": 10.0}
    assert found["mme mme_perception_score"]["value"] == 1500.5
    assert found["videomme videomme_perception_score"]["value"] == 58.25
    assert found["mme mme_total_score"] == {"value": 1800.75, "samples": 100}
    assert found["mme mme_perception_percent"] == {"value": 75.025, "samples": 100}
    assert len(found) == 10
    assert found["nocaps_val nocaps_CIDEr"]["value"] == 1.055
    assert found["nocaps_val nocaps_CIDEr x100"]["value"] == 105.5


def test_means_of_shares_are_of_numbers_given_one_each():
    found = {"a x": {"value": 30.0}, "b y": {"value": 1500.0}}
    assert relative(found, ("a x", "b y"), (60.0, 1000.0)) == 100.0
    with pytest.raises(PrunelabError, match="names 2 metrics and `against` 1"):
        relative(found, ("a x", "b y"), (60.0,))
    with pytest.raises(PrunelabError, match="gave no c z"):
        relative(found, ("c z",), (60.0,))


def test_data_sets_lie_where_they_were_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(visual_tasks.hub, "folder", lambda identity, kind, config: tmp_path / identity["hub"])
    name, commit = "lmms-lab-encoder/GQA", "0" * 40
    image = {"task": "gqa", "dataset_path": name, "dataset_kwargs": {"token": True}}
    video = {**image, "dataset_kwargs": {"video": True, "cache_dir": "films", "revision": "video"}}
    pinned = {name: {"hub": name, "revision": commit}}
    found = visual_tasks.located(image, pinned, {})
    assert found == {"dataset_path": str(tmp_path / name), "dataset_kwargs": None}
    given = visual_tasks.located(video, pinned, {})
    unpacked = {"video": True, "cache_dir": "films"}
    assert given == {"dataset_path": str(tmp_path / name), "dataset_kwargs": unpacked}
    assert visual_tasks.located(video, {}, {}) == {}
    with pytest.raises(PrunelabError, match="names no lmms-lab-encoder/GQA"):
        visual_tasks.located(image, {"lmms-lab/POPE": {}}, {})


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(PrunelabError, match=r"\[evaluation\]"):
        runner.measure(run("nowhere", "nowhere", ["gqa"]), {})


def columns():
    """Every column of every paper that this kind makes."""
    tables = [table for slug in papers.slugs() for table in papers.load(slug).tables]
    rows = [row for table in tables for row in table.rows.values() if isinstance(row, schema.Row)]
    found = [column for owner in (*tables, *rows) for column in owner.columns.values()]
    return [column for column in found if column.task == "visual_tasks"]


def asked(column):
    """The metrics of tasks that a column shows or averages; none where it shows what is of all tasks, such as time."""
    if column.metric in VisualTasks.metrics and column.metric not in MEANS:
        return ()
    of_several = column.metric in (*MEANS, "oracle", "oracle_budget")
    return column.settings.get("average", ()) if of_several else (column.metric,)


def test_columns_show_metrics_of_the_tasks_they_run():
    assert columns()
    for column in columns():
        assert set(column.scales) <= {"paper"} and column.data is None
        assert {name.split(" ")[0] for name in asked(column)} <= set(column.settings["tasks"]), column


def test_further_parts_of_a_set_come_from_where_it_was_downloaded(monkeypatch):
    pytest.importorskip("lmms_eval")
    space = {"load_dataset": lambda path, *rest, **more: (path, rest, more)}
    exec("def pictures(docs): return load_dataset('org/set', 'pictures', split='dev', token=True)", space)
    exec("def other(docs): return load_dataset('org/other')", space)
    monkeypatch.setattr(visual_tasks.hub, "folder", lambda entry, kind, config: Path("here") / entry["hub"])
    read = [{"process_docs": space["pictures"], "doc_to_visual": space["other"]}]
    before = space["load_dataset"]
    with visual_tasks.at_hand(read, {"org/set": {"hub": "org/set"}}, {}):
        assert space["pictures"](None) == (str(Path("here/org/set")), ("pictures",), {"split": "dev"})
        assert space["other"](None) == ("org/other", (), {})
    assert space["load_dataset"] is before
