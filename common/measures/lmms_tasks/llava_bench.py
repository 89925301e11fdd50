"""LLaVA-Bench (in the wild) with answers that a rule scores."""

from __future__ import annotations

from typing import Any

from prunelab.common.measures.lmms_tasks import mmvet
from prunelab.common.measures.lmms_tasks.rules import overlap

seen, question = mmvet.seen, mmvet.question


def process(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The overlap with the answer that GPT-4 gave, which the judge compares with."""
    return {"rule_score": overlap(results[0], doc["gpt_answer"])}
