"""A-OKVQA's multiple choice, on the validation set."""

from __future__ import annotations

from typing import Any

from prunelab.common.measures.lmms_tasks import mmvet
from prunelab.common.measures.lmms_tasks.rules import choice

seen = mmvet.seen


def options(doc: dict[str, Any]) -> dict[str, str]:
    """A question's choices by letter."""
    return dict(zip("ABCDEFGH", doc["choices"], strict=False))


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """A question with its choices, one a line."""
    shown = "\n".join(f"{letter}. {text}" for letter, text in options(doc).items())
    return f"{doc['question']}\n{shown}{(lmms_eval_specific_kwargs or {}).get('post_prompt', '')}"


def target(doc: dict[str, Any]) -> str:
    """The letter of the right choice."""
    return "ABCDEFGH"[doc["correct_choice_idx"]]


def process(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the right choice was named."""
    return {"accuracy": float(choice(results[0], options(doc)) == target(doc))}
