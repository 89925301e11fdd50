"""The Python that READMEs of data selectors show runs as it stands, on a tiny model and a few samples."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.references import language_model, token_ids

transformers = pytest.importorskip("transformers")
METHODS = Path(__file__).resolve().parents[3] / "methods"
NEWS = "the minister said on tuesday that talks about the budget would go on " * 10
STORY = "once upon a time a small fox walked through the wood and sang to the moon " * 10


class Words:
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [sum(word.encode()) % 60 + 1 for word in text.split()]}


def training(folder: Path) -> dict[str, Any]:
    """A model, and what a trainer asks for."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < 4, -100)} for ids in token_ids(8)]
    return {"model": language_model(), "arguments": arguments, "data": data} | {
        name: language_model(seed=7) for name in ("reference", "base_model", "caption_model")
    }


def files(folder: Path) -> dict[str, Any]:
    with gzip.open(folder / "big.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"{NEWS if i % 2 else STORY} number {i}"}) + "\n" for i in range(1002))
    (folder / "mine.jsonl").write_text(json.dumps({"text": NEWS}) + "\n")
    return {}


def adapters(folder: Path) -> dict[str, Any]:
    return {"peft_model": language_model(), "samples": list(token_ids(8))}


def classified(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "early": torch.nn.Linear(5, 3),
        "samples": [{"x": torch.randn(5), "labels": torch.tensor(i % 3)} for i in range(20)],
    }


def graded(folder: Path) -> dict[str, Any]:
    pairs = [(f"what is w{i}", f"it is w{i + 1}") for i in range(8)]
    return {"model": language_model(max_position_embeddings=256), "tokenizer": Words(), "samples": pairs} | {
        "token_ids": [Words()(" ".join(pair))["input_ids"] for pair in pairs]
    }


def warmed(folder: Path) -> dict[str, Any]:
    model, samples = language_model(), list(token_ids(20, 6))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(input_ids=samples[0][None], labels=samples[0][None]).loss.backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "samples": samples, "reference": samples[:2]}


GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    **dict.fromkeys(("rho1", "sstoken", "q_tuning", "prior_vlp"), training),
    "dsir": files, "ist": adapters, "distill_data_pruning": classified, "graded_samples": graded, "less": warmed,
}  # fmt: skip


@pytest.mark.parametrize("slug", GIVEN)
def test_the_code_of_the_readme_runs(slug, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (METHODS / slug / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        less = block.replace("steps=1000", "steps=2").replace("LESS()", "LESS(dimensions=64)")  # or else it takes long
        exec(compile(less, f"{slug}/README.md", "exec"), GIVEN[slug](tmp_path))
    printed = capsys.readouterr().out
    assert ("of " in printed) == ("print(" in page)  # how many of how many
    assert slug in ("dsir", "ist") or "`datasets.Dataset`" in page
