"""POPE's scorer, lmms-eval's own as the visual tasks use it, on answers that the authors of LLaVA-1.5-13B stored: its
figures must be those that come of the same answers by the rule of POPE's own script."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from prunelab.common.measures import visual_tasks

# of the stored answers, by subset: F1 and accuracy by POPE's own rule, as the folder's README gives them
FIGURES = {"random": (0.8714, 0.8801), "popular": (0.8625, 0.8743), "adversarial": (0.8446, 0.8550)}
TASKS = {"random": "pope_random", "popular": "pope_pop", "adversarial": "pope_adv"}


@pytest.fixture(scope="module")
def answers():
    """What the model said, by image and question."""
    folder = Path(os.environ.get("PRUNELAB_ASSETS") or "nowhere") / "pope" / "llava15"
    if not folder.is_dir():
        pytest.skip("the stored answers are not at hand (PRUNELAB_ASSETS)")

    def lines(name):
        with gzip.open(folder / name, "rt", encoding="utf8") as file:
            return [json.loads(line) for line in file]

    said = {entry["question_id"]: entry["text"] for entry in lines("answers_llava-v1.5-13b.jsonl.gz")}
    asked = lines("llava_pope_test.jsonl.gz")
    return folder, {(p["image"], p["text"].split("\n")[0]): said[p["question_id"]] for p in asked}


@pytest.mark.parametrize("subset", FIGURES)
def test_stored_answers_give_the_known_figures(answers, subset):
    pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed (the extra `evaluation`)")
    from lmms_eval.utils import load_yaml_config

    folder, said = answers
    with (folder / f"coco_pope_{subset}.json").open(encoding="utf8") as file:
        gold = [json.loads(line) for line in file]
    task = load_yaml_config(visual_tasks.index(None).task_index[TASKS[subset]]["yaml_path"], mode="full")
    scores = [
        task["process_results"](
            {"question_id": entry["question_id"], "answer": entry["label"]}, [said[entry["image"], entry["text"]]]
        )
        for entry in gold
    ]
    results = {
        f"{entry['metric']},none": entry["aggregation"]([score[entry["metric"]] for score in scores])
        for entry in task["metric_list"]
    }
    found = visual_tasks.percentages({"pope": results}, {"pope": len(gold)})
    f1, accuracy = FIGURES[subset]
    assert found["pope pope_f1_score"]["value"] == pytest.approx(100 * f1, abs=0.005)
    assert found["pope pope_accuracy"]["value"] == pytest.approx(100 * accuracy, abs=0.005)
    assert found["pope pope_accuracy"]["samples"] == len(gold) >= 2910
