"""MM-Vet with answers that a rule scores."""

from __future__ import annotations

from typing import Any

from prunelab.common.data.images import rgb
from prunelab.common.measures.lmms_tasks.rules import agreement


def seen(doc: dict[str, Any]) -> list[Any]:
    """A question's picture; some have none."""
    return [] if doc["image"] is None else [rgb(doc["image"])]


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """A question, with what the task puts around it."""
    given = lmms_eval_specific_kwargs or {}
    return f"{given.get('pre_prompt', '')}{doc['question']}{given.get('post_prompt', '')}"


def process(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """See `rules.agreement`."""
    return {"rule_score": agreement(results[0], doc["answer"])}
