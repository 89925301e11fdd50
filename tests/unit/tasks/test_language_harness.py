"""Zero-shot tasks through the real lm-evaluation-harness: a tiny random checkpoint and tasks of our own, whose numbers
must be those that the harness finds through its own loader."""

from __future__ import annotations

import gzip
import importlib
import json

import numpy as np
import pytest
import yaml

from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.experiments import runner
from prunelab.common.experiments.run import Run
from prunelab.common.measures import zero_shot
from prunelab.common.rehearsal import datasets

WORDS = 64


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `evaluation`)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, harness):
    """A tiny random Llama with a tokenizer of words, in hub layout."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=128, **sizes, **special)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape))
    backend = Tokenizer(
        models.WordLevel({f"w{n}": n for n in range(4, WORDS)} | {"<p>": 0, "<s>": 1, "</s>": 2, "<u>": 3}, "<u>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "unk_token": "<u>"}
    model.save_pretrained(place)
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, harness, folder):
    """Two tasks: a choice by likelihood, and an answer that is generated, which is right for every other question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"

    def words(count: int) -> str:
        return " ".join(f"w{n}" for n in random.integers(4, WORDS, count))

    rows = [
        {"question": words(4 + n % 5), "choices": [words(1 + n % 3), words(2), words(1)], "gold": n % 3}
        for n in range(12)
    ]
    for row in rows[::2]:
        prompt = tokenizer(row["question"], return_tensors="pt", add_special_tokens=False)
        made = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        row["choices"][0] = tokenizer.decode(made, skip_special_tokens=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    choice = {
        "task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                        for metric in ("acc", "acc_norm")],
    }  # fmt: skip
    written = {
        "task": "answers", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}", "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    kept = tmp_path_factory.mktemp("tasks")
    for task in (choice, written):
        (kept / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    with pytest.MonkeyPatch.context() as patch:
        manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(kept))
        patch.setattr(zero_shot, "known_tasks", lambda: manager)
        yield [choice["task"], written["task"]]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


def run(folder, tasks, method=None, budget=None, options=(), data=(), **settings):
    ids = {"model": {"assets": folder.name}, "calibration": {}, **dict(data)}
    return Run("zero_shot", "assets", method, dict(options), budget, {"tasks": tasks, **settings}, ids)


def execute(folder, *given, hub="", **settings):
    return runner.measure(run(folder, *given, **settings), {"assets": str(folder.parent), "hub": str(hub)})


def test_the_unpruned_model_gets_the_harnesss_own_numbers(harness, folder, tasks):
    found = execute(folder, tasks, batch=4)
    own = harness.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, tasks=tasks, device="cpu",
        batch_size=1, log_samples=False, task_manager=zero_shot.known_tasks(),
    )["results"]  # fmt: skip
    for task, metric in (("choices", "acc"), ("choices", "acc_norm"), ("answers", "exact_match")):
        measured = found[f"{task} {metric}"]
        assert measured["value"] == pytest.approx(100 * own[task][f"{metric},none"], abs=1e-3)
        assert measured["stderr"] == pytest.approx(100 * own[task][f"{metric}_stderr,none"], abs=1e-3)
    assert 0 < found["choices acc"]["value"] < 100
    assert found["answers exact_match"]["value"] == 50
    assert found["choices acc"]["protocol"] == f"lm-evaluation-harness {harness.__version__}"


def test_a_method_acts_on_what_the_harness_asks(folder, tasks):
    dense = execute(folder, tasks[:1])["choices acc"]
    assert execute(folder, tasks[:1], "magnitude", "1.0")["choices acc"]["value"] == dense["value"]
    assert execute(folder, tasks[:1], "magnitude", "0.05")["sparsity"]["value"] == pytest.approx(95, abs=0.1)
    assert execute(folder, tasks[:1], limit=6)["choices acc"]["stderr"] > dense["stderr"]


def test_a_cache_is_pruned_while_the_harness_lets_the_model_write(folder, tasks):
    def right(*pruned, **options):
        return execute(folder, tasks[1:], *pruned, **options)["answers exact_match"]["value"]

    assert right("snapkv", "1.0", {"window_size": 1}, batch=3) == 50
    assert right("snapkv", "1count", {"window_size": 1}) < 50


def test_a_task_of_the_harness_reads_the_folder_that_stands_in_for_its_data(folder, tmp_path):
    place = tmp_path / "baber" / "piqa"
    place.mkdir(parents=True)
    row = {"goal": "w5 w6", "sol1": "w7", "sol2": "w8 w9", "label": 0}
    for split, count in (("train", 2), ("validation", 6)):
        (place / f"{split}.jsonl").write_text("\n".join(json.dumps({**row, "label": n % 2}) for n in range(count)))
    data = {"data of piqa": {"hub": "baber/piqa", "tasks": ["piqa"], "local": "0"}}
    found = execute(folder, ["piqa"], data=data, hub=tmp_path, shots=0)["piqa acc"]
    assert found["value"] == 50 and found["stderr"] > 0


def test_a_group_of_the_harness_reads_the_folder_that_stands_in_for_its_data(folder, tmp_path):
    """MMLU is made of groups, whose 57 tasks keep their names."""
    place = tmp_path / "cais" / "mmlu"
    place.mkdir(parents=True)
    datasets.parts("cais/mmlu", place)
    data = {"data of mmlu": {"hub": "cais/mmlu", "tasks": ["mmlu"], "local": "0"}}
    found = execute(folder, ["mmlu"], data=data, hub=tmp_path, shots=0, limit=1)
    assert {"mmlu acc", "mmlu_stem acc", "mmlu_virology acc"} <= set(found)


def test_each_task_of_a_group_of_the_harness_reads_a_folder_of_its_own(folder, tmp_path):
    """AGIEval's tasks lie in a repository each."""
    names = lookup.of_tasks(["agieval_en"])
    data = {f"data of {name}": {**lookup.datasets()[name]["paper"], "local": "0"} for name in names}
    for each in data.values():
        (tmp_path / each["hub"]).mkdir(parents=True)
        datasets.parts(each["hub"], tmp_path / each["hub"])
    found = execute(folder, ["agieval_en"], data=data, hub=tmp_path, shots=0, limit=1)
    assert {f"{each['tasks'][0]} acc" for each in data.values()} | {"agieval_en acc"} <= set(found) and len(names) == 10


def test_a_task_of_the_harness_reads_the_files_of_its_authors(folder, tmp_path):
    """LogiQA, whose files on the hub are made by a program that no current `datasets` runs."""
    datasets.logic(tmp_path)
    data = {"data of logiqa": {"loader": "logiqa", "setting": "logiqa", "tasks": ["logiqa"]}}
    found = runner.measure(
        run(folder, ["logiqa"], data=data, shots=1, limit=4),
        {"assets": str(folder.parent), "hub": "", "logiqa": str(tmp_path)},
    )
    assert found["logiqa acc"]["value"] == 25, "each letter is right once, and all four questions offer the same"


def test_a_task_of_the_harness_reads_rows_of_an_assets_folder(folder, tmp_path):
    """Rows under names of their own, as `tasks` of the catalogue's entry says, through the harness's scoring."""
    place = folder.parent / "rows"
    place.mkdir(exist_ok=True)
    rows = [{"query": "w5 w6 ", "choices": ["w7", "w8 w9"], "gold": n % 2} for n in range(6)]
    with gzip.open(place / "piqa.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    says = {"file": "piqa.jsonl.gz", "doc_to_text": "{{query.strip()}}\nAnswer:", "doc_to_choice": "choices"}
    data = {
        "data of piqa": {"loader": "lm_eval", "folder": "rows", "tasks": {"piqa": {**says, "doc_to_target": "gold"}}}
    }
    found = execute(folder, ["piqa"], data=data)["piqa acc"]
    assert found["value"] == 50 and found["stderr"] > 0
    with pytest.raises(PrunelabError, match="no file of rows holds the questions of piqa_other"):
        zero_shot.located(["piqa_other"], data, {"assets": str(folder.parent)})
