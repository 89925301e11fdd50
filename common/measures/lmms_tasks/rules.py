"""How answers are scored by rule where their benchmarks ask a judge."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

ARTICLES = frozenset({"a", "an", "the"})
SHORT = 5  # words of a reference that an answer has to hold; of longer ones it has to hold as much as it can


def words(text: str) -> list[str]:
    """In lower case, without punctuation and articles; a number keeps its sign and point."""
    results = re.findall(r"-?\d+(?:\.\d+)?|\w+", text.lower())
    return [word for word in results if word not in ARTICLES]


def holds(answer: str, reference: str) -> bool:
    """Whether the reference's words stand in the answer, next to each other."""
    spoken, wanted = words(answer), words(reference)
    return any(spoken[at : at + len(wanted)] == wanted for at in range(len(spoken) - len(wanted) + 1)) and bool(wanted)


def overlap(answer: str, reference: str) -> float:
    """ROUGE-L F of an answer against a reference, between 0 and 1."""
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


def agreement(answer: str, reference: str) -> float:
    """How far an answer agrees with a reference, between 0 and 1: a short one it holds or not, of a longer one (over
    `SHORT` words) the overlap counts. Of alternatives parted by `<OR>` the best counts, of parts that belong together,
    parted by `<AND>`, the mean."""
    best = 0.0
    for alternative in reference.split("<OR>"):
        parts = [part.strip() for part in alternative.split("<AND>") if part.strip()]
        scores = [float(holds(answer, part)) if len(words(part)) <= SHORT else overlap(answer, part) for part in parts]
        best = max(best, sum(scores) / len(scores) if scores else 0.0)
    return best


def choice(answer: str, options: dict[str, str]) -> str:
    """The letter of the option that an answer names, by letter or, if by none, by its words; empty where by neither."""
    letter = re.match(rf"^\W*([{''.join(options)}])(?![a-z])", answer.strip())
    if letter:
        return letter[1]
    named = [letter for letter, text in options.items() if holds(answer, text)]
    return named[0] if len(named) == 1 else ""


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
