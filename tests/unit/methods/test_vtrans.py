"""VTrans beyond the golden cases: the budget over the model, masks alone, the constraint, nothing left behind."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.training import engine
from prunelab.common.training.recipe import Recipe
from prunelab.common.weights.masks import within
from prunelab.methods.vtrans.method import Constraint, VTrans, soft_mask
from tests.contract.references import language_model, token_ids

RECIPE = Recipe(steps=8, batch=4, rate=1e-3)


def train(method=None, budget=0.5):
    model, teacher = language_model(), language_model()
    given = {"services": {"teacher": teacher}, "progress": False}
    return model, teacher, engine.train(method or VTrans(), model, budget, token_ids(16), RECIPE, **given)


def test_the_best_units_of_the_model_fill_the_budget():
    scores = [torch.tensor([5.0, 1.0]), torch.tensor([4.0, 3, 2, 0])]
    assert [m.tolist() for m in within(scores, [2, 1], 0.5)] == [[True, False], [True, True, False, False]]
    alone = within(scores, [2, 1], 0.01)
    assert [int(m.sum()) for m in alone] == [1, 1]
    assert all(bool(m.all()) for m in within(scores, [2, 1], 1.0))


@pytest.mark.parametrize("budget", [0.4, 0.8])
def test_the_budget_is_met_in_parameters(budget):
    plan = train(budget=budget)[2]
    decided = [(t, d) for t, d in plan.decisions() if t.unit in ("heads", "channels")]
    held = sum(d.kept * t.size for t, d in decided) / sum(t.parameters for t, _ in decided)
    assert budget - 0.08 < held <= budget + 1e-9


def test_masks_alone_leave_what_stays_as_it_was_but_for_its_factor():
    model, teacher, plan = train(VTrans(learns="masks"))
    assert torch.equal(model.lm_head.weight, teacher.lm_head.weight)
    kept = plan.decision(next(t for t in plan.targets if t.unit == "channels" and t.block == 0)).mask
    up, down = (m.model.layers[0].mlp.up_proj.weight for m in (model, teacher))
    assert torch.equal(up, down[kept])


def test_nothing_is_left_on_model_or_teacher():
    model, teacher, _ = train()
    for each in (model, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in each.modules())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), language_model().parameters(), strict=True))


def test_the_constraint_pushes_towards_the_budget():
    constraint = Constraint()
    with torch.no_grad():
        constraint.lambda1.fill_(2.0)
        constraint.lambda2.fill_(3.0)
    assert float(constraint(torch.tensor(0.5)).detach()) == pytest.approx(1.75)
    assert soft_mask(torch.tensor([-9.0, 0, 9])).tolist() == pytest.approx([1, 0.5, 0])


def test_noise_decides_by_itself_and_leaves_one_at_least():
    plan = train(VTrans(decides="noise"), 0.1)[2]
    kept = [d.kept for t, d in plan.decisions() if t.unit in ("heads", "channels")]
    assert min(kept) >= 1
