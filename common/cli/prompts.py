"""A method on a text that a language model reads as its prompt: how it goes on with pruning and without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunelab.common import testbeds
from prunelab.common.apply import apply, supports
from prunelab.common.cli import images
from prunelab.common.cli.app import console
from prunelab.common.cli.apply import deliver
from prunelab.common.cli.texts import read
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.method import Method
from prunelab.common.models import loading

MODELS = ("code_lm", "code_moe")  # testbeds
NEW = 48  # tokens that are written
SERVICES: Mapping[str, str] = {"draft": "code_draft"}  # second models with the tokens of the first testbed


def run(method: Method, file: Path, budget: Budget, out: Path | None, name: str, config: Mapping[str, Any]) -> None:
    """Print both continuations and what pruning saved; the pruned one goes to `out`."""
    text = read(file)
    if not text.strip():
        raise PrunelabError(f"{file} holds no text; give one that a language model can go on from")
    services = {}
    for service in method.services:
        if name or service not in SERVICES:
            raise PrunelabError(f"{method.name} needs a second model, its {service}; use it in code, see its README")
        services[service] = testbeds.load(SERVICES[service])[0]
    name = name or images.reader(method, MODELS)
    model, tokenizer = loading.language(_identity(name, config), config)
    if not (why := supports(method, model)):
        raise PrunelabError(f"{why}; give --model a folder of another language model, or leave it out")
    ids = tokenizer(text, return_tensors="pt").input_ids
    room = int(getattr(model.config, "max_position_embeddings", 1 << 20)) - NEW
    if ids.shape[1] > room:
        console.print(f"the prompt has {ids.shape[1]} tokens; {name} reads the last {room} of them")
        ids = ids[:, -room:]
    written = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        dense = model.generate(**given, **written)
        with apply(method, model, budget, services=services) as handle:
            pruned = model.generate(**given, **written)
        report = handle.report()
    continuations = [tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) for made in (dense, pruned)]
    for label, words in zip((f"{name}, unpruned", f"{method.name} at {budget}"), continuations, strict=True):
        console.print(f"[bold]{label}[/bold]")
        console.print(words, markup=False)
    mat = getattr(report, "mat", None)
    same = "the text is the same" if continuations[0] == continuations[1] else "the text differs"
    console.print(str(report) if mat is None else f"{mat:.2f} tokens a step; {same}")
    if name in testbeds.testbeds():
        console.print(f"{name} is a toy of ours that knows Python source alone; --model FOLDER reads other texts")
    if out is not None:
        out = out / f"{file.stem}.{method.name}.txt" if out.is_dir() else out
        console.print(deliver(out, continuations[1] + "\n", "continuation"), soft_wrap=True)


def _identity(name: str, config: Mapping[str, Any]) -> dict[str, str]:
    if name in testbeds.testbeds():
        if not (testbeds.SHIPPED / name / "tokenizer.json").is_file():
            raise PrunelabError(f"the testbed {name} reads no text; leave --model out, or give a folder")
        return {"testbed": name}
    if (Path(name) / "config.json").is_file():
        return {"folder": name}
    if config["assets"] and (Path(config["assets"]) / name / "config.json").is_file():
        return {"assets": name}
    raise PrunelabError(f"there is no language model '{name}'; give a folder in the hub's layout, or leave --model out")
