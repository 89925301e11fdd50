"""GLUE from a folder in the hub's layout, and a small encoder that learns it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import glue
from prunelab.common.measures import glue as measured
from prunelab.common.measures.bench import Bench
from prunelab.common.tasks import get

GOOD, BAD = "good fine bright", "bad poor dark"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD.split(), *BAD.split(), "film"]


def write(folder, task, split, rows):
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / f"{split}-00000-of-00001.parquet").write_text(json.dumps(rows))


@pytest.fixture(autouse=True)
def parquet(monkeypatch):
    """A reader of JSON in the place of pyarrow, which is no requirement."""
    reader = SimpleNamespace(read_table=lambda path: SimpleNamespace(to_pylist=lambda: json.loads(path.read_text())))
    monkeypatch.setattr(glue, "optional", lambda module, what: reader)


@pytest.fixture
def config(tmp_path):
    data, model = tmp_path / "nyu-mll" / "glue", tmp_path / "some" / "bert"
    for task, (columns, classes) in glue.TASKS.items():
        rows = []
        for i in range(12):
            texts = [f"film {(GOOD if i % 2 else BAD).split()[i % 3]}"] * len(columns)
            label = i % 2 if classes else 4.0 * (i % 2) + 0.1 * (i % 3)
            rows.append({**dict(zip(columns, texts, strict=True)), "label": label})
        write(data, task, "train", rows)
        write(data, task, "validation_matched" if task == "mnli" else "validation", rows[:8])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(model)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(model)
    return {"hub": str(tmp_path)}


def run(config, **settings) -> dict[str, Any]:
    ids = {"model": {"hub": "some/bert", "local": "0"}, "data": {"hub": "nyu-mll/glue", "local": "0"}}
    given = get("glue").read({"epochs": 30, "batch": 4, "rate": 3e-3, "runs": 1, "length": 12, **settings})
    return get("glue")().measure(Bench("paper", ids, given, config, None, {}, None))


def test_an_encoder_learns_classes_and_likenesses(config):
    names = ("mnli", "cola", "rte", "stsb")
    result = run(config, tasks=names, begun=["rte", "stsb"])
    assert set(result) == {*names, "average"} and all(result[task]["value"] > 80 for task in names)
    assert result["average"]["value"] == pytest.approx(sum(result[task]["value"] for task in names) / 4)
    assert "stderr" not in result["rte"] and result["rte"]["n"] == 8


def test_the_median_over_runs_counts_and_a_seed_decides_all(config):
    twice = [run(config, tasks=["sst2"], epochs=1, runs=3) for _ in range(2)]
    assert (
        twice[0] == twice[1]
        and "median of 3 trainings" in twice[0]["sst2"]["protocol"]
        and "stderr" in twice[0]["sst2"]
    )


def test_scores():
    logits, labels = torch.tensor([[0.0, 1], [0, 1], [1, 0], [1, 0]]), torch.tensor([1.0, 0, 0, 0])
    assert measured.score("rte", logits, labels) == 75
    assert measured.score("cola", logits, labels) == pytest.approx(100 * 2 / (2 * 2 * 1 * 3) ** 0.5)  # 2 x 2 table
    assert measured.score("cola", logits[:2], labels[:2]) == 0, "a constant guess"
    assert measured.score("stsb", torch.tensor([[1.0], [2], [9]]), torch.tensor([0.0, 1, 2])) == pytest.approx(100)
    assert measured.score("stsb", torch.ones(3, 1), torch.tensor([0.0, 1, 2])) == 0


def test_what_is_no_glue_is_refused(config, tmp_path):
    identity = {"hub": "nyu-mll/glue", "local": "0"}
    write(tmp_path / "nyu-mll" / "glue", "rte", "train", [{"sentence1": "a", "sentence2": "b", "label": -1}])
    with pytest.raises(PrunelabError, match="no labelled rte"):
        glue.load(identity, config, "rte", "train")
    write(tmp_path / "nyu-mll" / "glue", "rte", "train", [{"sentence1": "a", "label": 1}])
    with pytest.raises(PrunelabError, match="no part of GLUE"):
        glue.load(identity, config, "rte", "train")
    with pytest.raises(PrunelabError, match="mnli is then the first"):
        get("glue").read({"tasks": ["rte", "mnli"], "begun": ["rte"]})
