"""Learning rates and optimisers of the recipes."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.training.recipe import LinearRecipe, MomentumRecipe, Recipe
from tests.contract.references import language_model


def test_rates_rise_and_fall_as_the_recipe_says():
    cosine, line = Recipe(10, 1, 1.0, 0.2), LinearRecipe(10, 1, 1.0, 0.2)
    assert [cosine.factor(step) for step in (0, 1, 2, 6)] == pytest.approx([0.5, 1, 1, 0.5])
    assert [line.factor(step) for step in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1, 1, 0.5, 0.125])
    steps = MomentumRecipe(8, 1, 1.0)
    assert [steps.factor(step) for step in (0, 3, 4, 5, 6, 7)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_parameters_have_settings_of_their_own():
    model = language_model()
    optimizer = MomentumRecipe(8, 1, 0.1).optimizer(
        model, lambda name: {"maximize": True, "scale": 3.0} if name.endswith("lm_head.weight") else {}
    )
    assert isinstance(optimizer, torch.optim.SGD)
    own = next(group for group in optimizer.param_groups if group["maximize"])
    assert own["params"] == [model.lm_head.weight] and own["scale"] == 3.0 and own["momentum"] == 0.9
    norms = next(g for g in optimizer.param_groups if any(p is model.model.norm.weight for p in g["params"]))
    assert norms["weight_decay"] == 0 and norms["scale"] == 1
