"""Prompts that a method shortens by what the model itself expects, before the model answers them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures.bench import Bench
from prunelab.common.ranking.prompts import Informed, PromptShortener, self_information, surprise

LONGEST = 512  # tokens of a sentence that are read at once; tables and code have no full stops
SENTENCE = 25  # assumption: tokens of a sentence of a random prompt


def shortener(bench: Bench[Any]) -> PromptShortener[Any]:
    """The run's method. Raises PrunelabError where it ranks other things than words of a prompt."""
    method: Any = bench.method()
    if not isinstance(method, PromptShortener):
        raise PrunelabError(f"{method.name} ranks no words of a prompt; use a method such as selective_context")
    return method


def contexts(bench: Bench[Any], model: Any, tokenizer: Any) -> Callable[[Any], Any]:
    """What shortens the text under `context` in a request of lm-evaluation-harness; its instructions and its question
    stay whole."""
    method = shortener(bench)
    services = {"information": self_information(model, tokenizer, LONGEST)}

    def shortened(request: Any) -> Any:
        prompt, *rest = request.args
        whole = request.doc.get("context")
        if not isinstance(whole, str) or whole not in prompt:
            raise PrunelabError(f"the task {request.task_name} has no context apart from its question to shorten")
        left = method.compress(whole, bench.budget, services) if whole.strip() else whole
        result = copy.copy(request)
        result.arguments = (prompt.replace(whole, left, 1), *rest)
        return result

    return shortened


def ask_shortened(evaluated: Any, shortened: Callable[[Any], Any]) -> None:
    """Have a wrapper of the harness ask shortened prompts; answers, which alone it is asked for, keep their places."""
    ask = evaluated.generate_until

    def generate_until(requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[str]:
        answers: list[str] = ask([shortened(request) for request in requests], *args, **kwargs)
        return answers

    evaluated.generate_until = generate_until


def prompt(bench: Bench[Any], model: Any, given: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """What shortens a prompt of random tokens, read as sentences of numbers by the model that then answers it: the time
    that this takes is part of the answer's."""
    method, budget = shortener(bench), bench.budget
    ids = given["input_ids"][0].tolist()
    sentences = [ids[at : at + SENTENCE] for at in range(0, len(ids), SENTENCE)]
    text = " ".join(" ".join(map(str, part)) + "." for part in sentences)

    def information(sentence: str) -> Informed:
        read = numbers(sentence)
        return [f"{number} " for number in read], surprise(model, ids[0], read)  # apart also where a sentence ends

    def shortened() -> dict[str, Any]:
        left = numbers(method.compress(text, Budget.of(budget), {"information": information}))
        kept = torch.tensor([left], device=given["input_ids"].device)
        return {"input_ids": kept, "attention_mask": torch.ones_like(kept)}

    return shortened


def numbers(text: str) -> list[int]:
    """Those in a text."""
    return [int(word) for word in re.findall(r"\d+", text)]
