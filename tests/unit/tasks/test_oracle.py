"""The oracle over budgets: best score, least budget, and what is refused."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures import oracle, visual_tasks

LEVELS = oracle.levels(["1count", "4count"], Budget(16, "count"))


def test_each_sample_counts_under_the_least_budget_that_is_right():
    scores = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]])  # budgets x samples
    found = oracle.chosen(scores, LEVELS)
    assert found["oracle"]["value"] == 75.0 and "bits" in found["oracle"]
    assert found["oracle_budget"]["value"] == pytest.approx((4 + 1 + 1 + 16) / 4)


def test_parts_of_a_point_count_by_the_best():
    found = oracle.chosen(torch.tensor([[0.3, 0.0], [0.9, 0.6], [0.9, 0.3]]), LEVELS)
    assert found["oracle"]["value"] == pytest.approx(75.0, abs=1e-3) and found["oracle_budget"]["value"] == 4.0


@pytest.mark.parametrize("smaller", [["4count", "1count"], ["0.5"], ["16count"]])
def test_budgets_have_to_rise(smaller):
    with pytest.raises(PrunelabError, match="that rise to the run's own"):
        oracle.levels(smaller, Budget(16, "count"))


def test_what_the_library_logs_of_single_questions():
    runs = [{"task": [{"doc_id": i, "exact_match": float(i == run), "file": {}} for i in order]}
            for run, order in enumerate(([0, 1, 2], [2, 0, 1]))]  # fmt: skip
    assert visual_tasks.each_question(runs, "task exact_match").tolist() == [[1, 0, 0], [0, 1, 0]]
    for name in ("task file", "task other", "other exact_match"):
        with pytest.raises(PrunelabError, match="of single questions"):
            visual_tasks.each_question(runs, name)
