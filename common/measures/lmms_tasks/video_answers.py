"""Open answers about videos that a rule scores, where the benchmarks ask GPT-3.5 for a verdict and 0 to 5 points."""

from __future__ import annotations

from typing import Any

from prunelab.common.measures.lmms_tasks import mmvet
from prunelab.common.measures.lmms_tasks.rules import agreement

POINTS = 5  # the judge's best score

question = mmvet.question


def seen(doc: dict[str, Any]) -> list[str]:
    """The video of a question, in a folder that the reader brought."""
    return [doc["video"]]


def process(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """See `rules.agreement`, as a share and as points."""
    agreed = agreement(results[0], doc["answer"])
    return {"rule_score": agreed, "rule_points": POINTS * agreed}
