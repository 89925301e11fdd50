"""Grades that language models give instructions and their answers: the mean of the grades, each as likely as the model
says that it is the next word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.common.core.errors import PrunelabError


@dataclass(frozen=True)
class Grading:
    """What a grader is asked, with `{question}` and `{answer}` in it, and the grades that it may give."""

    text: str
    grades: tuple[int, ...]


GRADINGS: Mapping[str, Grading] = {
    "accuracy": Grading(
        "Instruction:\n{question}\n\nAnswer:\n{answer}\n\nOn a scale from 0 (wrong or beside the point) to 5 (right and"
        " complete), the accuracy of this answer is ",
        (0, 1, 2, 3, 4, 5),
    ),
    # What Deita's released scorers were trained to continue.
    "complexity": Grading(
        "You are a helpful assistant. Please identify the complexity score of the following user query. \n##Query:"
        " {question}  \n##Complexity: ",
        (1, 2, 3, 4, 5, 6),
    ),
    "quality": Grading(
        "You are a helpful assistant. Please identify the quality score of the Response corresponding to the Question."
        " \n #Question#:\n{question}\n#Response#:\n{answer} \n##Quality: ",
        (1, 2, 3, 4, 5, 6),
    ),
}  # fmt: skip


@torch.inference_mode()
def grades(
    model: nn.Module, tokenizer: Any, kind: str, pairs: Sequence[tuple[str, str]], *, length: int = 2048, batch: int = 8
) -> Tensor:
    """The grade [n] of each instruction and answer, of `GRADINGS`. What is longer than `length` tokens loses the end
    of its answer; prompts of one length pass together."""
    grading = GRADINGS[kind]
    ids = torch.tensor([_one(tokenizer, str(grade)) for grade in grading.grades])
    values = torch.tensor(grading.grades, dtype=torch.float64)
    device = next(model.parameters()).device
    prompts = [_prompt(tokenizer, grading.text, *pair, length) for pair in pairs]
    results = torch.zeros(len(prompts), dtype=torch.float64)
    indices = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    while indices:
        size = len(prompts[indices[0]])
        group = [place for place in indices[:batch] if len(prompts[place]) == size]
        indices = indices[len(group) :]
        tokens = torch.tensor([prompts[place] for place in group], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, -1].double().cpu()
        results[group] = logits[:, ids].softmax(-1) @ values
    return results


def _one(tokenizer: Any, word: str) -> int:
    """The token of a figure, by itself or behind what a tokenizer puts before a word."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if not ids:
        raise PrunelabError(f"the grader's tokenizer knows no '{word}'; choose another model")
    return int(ids[-1])


def _prompt(tokenizer: Any, text: str, question: str, answer: str, length: int) -> list[int]:
    whole: list[int] = tokenizer(text.format(question=question, answer=answer))["input_ids"]
    if len(whole) <= length:
        return whole
    field, long = ("{answer}", answer) if "{answer}" in text else ("{question}", question)
    head, _, tail = text.partition(field)
    start: list[int] = tokenizer(head.replace("{question}", question))["input_ids"]
    middle, end = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (long, tail))
    start = start[: max(length - len(end), 0)]
    return [*start, *middle[: max(length - len(end) - len(start), 0)], *end]
