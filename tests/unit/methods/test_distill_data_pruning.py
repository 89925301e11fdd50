"""Data pruning under distillation: scores, classes, the loss, and the task that trains students."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data_selection.engine import select
from prunelab.common.measures.bench import Bench
from prunelab.common.tasks import get
from prunelab.common.training.distillation import distillation
from prunelab.methods.distill_data_pruning.method import (
    DataPruning,
    distilled,
    error_norm,
    forgetting,
    per_class,
)

T = torch.tensor


def test_the_error_norm_is_largest_where_the_model_is_sure_and_wrong():
    logits, labels = T([[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]]), T([0, 0, 0])
    norms = error_norm(logits, labels)
    assert norms.tolist() == pytest.approx([0.0002, 0.5**0.5, 2**0.5], abs=1e-3)
    assert torch.allclose(error_norm(torch.stack([logits, logits.flip(0)]), labels), (norms + norms.flip(0)) / 2)


def test_forgetting_counts_what_was_right_and_is_wrong_again():
    correct = T([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1]]).bool()
    assert forgetting(correct).tolist() == [2, 0, 4, 1]


def test_every_class_keeps_its_share():
    scores, labels = torch.arange(12.0), T([0] * 8 + [1] * 4)
    assert per_class(scores, labels, Budget(0.5)).tolist() == [4, 5, 6, 7, 10, 11]
    assert per_class(scores, labels, Budget(5, "count")).tolist() == [5, 6, 7, 10, 11], "what is left over: the best"
    assert per_class(scores, labels, Budget(1.0)).tolist() == list(range(12))


def test_the_loss_is_between_both_terms():
    logits, teacher, labels = torch.randn(5, 3), torch.randn(5, 3), T([0, 1, 2, 0, 1])
    plain, taught = F.cross_entropy(logits, labels), distillation(logits, teacher, 4.0)
    assert torch.allclose(distilled(logits, labels, teacher, 0.0), plain)
    assert torch.allclose(distilled(logits, labels, teacher, 1.0), taught)
    assert torch.allclose(distilled(logits, labels, teacher, 0.3), 0.7 * plain + 0.3 * taught)
    assert torch.allclose(distilled(logits, labels, teacher, 1.0, squared=False), taught / 16)


def test_what_a_score_lacks_is_said():
    samples = [{"x": torch.randn(4), "labels": T(i % 2)} for i in range(6)]
    options = {"model": torch.nn.Linear(4, 2), "forward": lambda model, batch: model(batch["x"])}
    with pytest.raises(PrunelabError, match="services="):
        select(DataPruning("forgetting"), samples, 0.5, **options)
    with pytest.raises(PrunelabError, match="services="):
        select(DataPruning("forgetting"), samples, 0.5, services={"correct": torch.ones(3, 5)}, **options)
    assert len(select(DataPruning("random", balanced=True), samples, 0.5)) == 3
    unlabelled = [{"x": torch.randn(4)} for _ in range(6)]
    with pytest.raises(PrunelabError, match="one of the `labels`"):
        select(DataPruning(), unlabelled, 0.5, **options)


def run(method=None, budget=None, options=None, **settings):
    task = get("subset")
    given = {"steps": 60, "students": 2, **settings}
    return task().measure(
        Bench("testbed", {"data": {"loader": "digits"}}, task.read(given), {}, method, options or {}, budget)
    )


@pytest.mark.parametrize("score", ["error_norm", "forgetting", "random"])
def test_students_of_every_score_learn(score):
    found = run("distill_data_pruning", "0.2", {"score": score}, alpha=0.9)
    assert found["samples"]["value"] == pytest.approx(20, abs=0.1) and found["top1"]["value"] > 25
    assert found["top1"]["n"] == 400 and found == run("distill_data_pruning", "0.2", {"score": score}, alpha=0.9)


def test_a_teacher_helps_where_little_is_kept():
    options = {"score": "random", "balanced": True}
    alone, taught = (run("distill_data_pruning", "0.03", options, alpha=a, steps=300) for a in (0.0, 0.9))
    assert taught["top1"]["value"] > alone["top1"]["value"] and alone["fewest"]["value"] >= 3
    assert run(steps=300)["top1"]["value"] > 90
    with pytest.raises(PrunelabError, match="lies in"):
        run(alpha=2.0)
