"""VNBench (arXiv 2406.09367), needles in videos: every question is asked four times with its options in other orders,
and counts where all four are right. Prompt and scoring follow the authors' evaluation (joez17/VideoNIAH)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from prunelab.common.measures.lmms_tasks import video_answers

LETTERS = "ABCD"

seen = video_answers.seen


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """A question with its options, one a line."""
    shown = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, doc["options"], strict=True))
    return f"{doc['question']}\n{shown}{(lmms_eval_specific_kwargs or {}).get('post_prompt', '')}"


def process(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Whether the right letter comes first among those before a full stop, by kind and sample."""
    answer = results[0].split(".")[0]
    named = next((letter for letter in LETTERS if letter in answer), "")
    return {"vnbench_score": {"kind": doc["kind"], "sample": doc["sample"], "right": named == doc["answer"]}}


def score(results: list[dict[str, Any]]) -> float:
    """Of each kind the share of samples that were right in every order, in the mean over the kinds."""
    kinds: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        kinds[result["kind"]][result["sample"]].append(result["right"])
    shares = [sum(map(all, samples.values())) / len(samples) for samples in kinds.values()]
    return sum(shares) / len(shares)
