"""Questions of lm-evaluation-harness with their answers, as samples of what a model is to learn."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.data.instructions import IGNORED
from prunelab.common.data.tuning import Piece
from prunelab.common.measures import zero_shot
from prunelab.common.measures.bench import Bench


def examples(bench: Bench[Any], tokenizer: Any, count: int, length: int) -> dict[str, list[Piece]]:
    """By task, `count` questions with their answers, which alone count, drawn with the seed from the training splits of
    the run's tasks that have one; no more than `length` tokens of each."""
    zero_shot.harness()
    gathered = importlib.import_module("lm_eval.tasks").get_task_dict(
        zero_shot.located(list(bench.settings.tasks), bench.ids, bench.config)
    )
    results: dict[str, list[Piece]] = {}
    for name, task in _single(gathered):
        if not task.has_training_docs():
            continue
        rows = task.training_docs()
        drawn = random.Random(bench.seed).sample(range(len(rows)), min(count, len(rows)))
        results[name] = [_example(task, rows[place], tokenizer, length) for place in drawn]
    if not results:
        raise PrunelabError("none of the tasks has a training split to take target examples from; name one that has")
    return results


def _single(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Tasks of the harness, those of groups one by one."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _single(task)
        else:
            yield str(name), task


def _example(task: Any, row: Any, tokenizer: Any, length: int) -> Piece:
    question, answer = task.doc_to_text(row), task.doc_to_target(row)
    choices = task.doc_to_choice(row) if task.config.doc_to_choice else []
    if isinstance(question, int):  # where the choice is what is asked about
        question = choices[question]
    if isinstance(answer, list | tuple):
        answer = answer[0]
    answer = choices[answer] if isinstance(answer, int) and choices else str(answer)
    start = tokenizer(question)["input_ids"]
    end = tokenizer(task.config.target_delimiter + answer, add_special_tokens=False)["input_ids"]
    room = max(length - len(end), 1)
    tokens = torch.tensor([*start[-room:], *end][:length])
    labels = tokens.clone()
    labels[: len(start[-room:])] = IGNORED
    return Piece(answer, tokens, labels, question)
