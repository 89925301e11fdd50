"""Examples that stand before a question of lmms-eval: other questions of the same task, with their answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunelab.common.core.errors import PrunelabError

Document = Mapping[str, Any]
Messages = Callable[[Document], list[dict[str, Any]]]

ANSWERS = ("multiple_choice_answer", "answer", "answers")  # fields of a document that may hold its answer


@dataclass(frozen=True)
class Examples:
    """So many questions drawn for each, with a seed; `targets` says of every task which field of its documents, or what
    function of them, is the answer."""

    count: int = 0
    seed: int = 0
    targets: Mapping[str, str | Callable[[Document], Any] | None] = field(default_factory=dict)

    def before(self, messages: Messages, task: str, documents: Sequence[Document], place: int) -> list[dict[str, Any]]:
        """The turns that stand before the question at a place among the documents: each example is asked as the task
        asks it, and answered."""
        results: list[dict[str, Any]] = []
        for number in drawn(self.count, len(documents), place, f"{self.seed} {task} {place}"):
            document = documents[number]
            text = answer(document, self.targets.get(task))
            if text is None:
                raise PrunelabError(f"the questions of {task} tell no answer in a word; they cannot be examples")
            reply = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            results += [*messages(document), reply]
        return results


def drawn(count: int, size: int, place: int, seed: str) -> list[int]:
    """So many of `size` places, all but one of them, in the order of the draw."""
    if count >= size:
        raise PrunelabError(f"{count} examples cannot be drawn beside a question of {size}; take fewer")
    chosen = random.Random(seed).sample(range(size - 1), count)
    return [number + (number >= place) for number in chosen]


def answer(document: Document, target: str | Callable[[Document], Any] | None) -> str | None:
    """A document's answer: what its task says, or of several the most frequent, of equal ones the first."""
    if callable(target):
        return _word(target(document))
    fields = (*((target,) if target else ()), *ANSWERS)
    return next((word for name in fields if (word := _word(document.get(name))) is not None), None)


def _word(value: Any) -> str | None:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Sequence) and value and not isinstance(value, str):
        words = [_word(each["answer"] if isinstance(each, Mapping) else each) for each in value]
        return Counter(word for word in words if word).most_common(1)[0][0] if any(words) else None
    return None
