"""Random pruning: densities add up, criteria leave the network as it was, and bad input is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.training.engine import train
from prunelab.common.training.recipe import Recipe
from prunelab.methods.random_pruning.method import (
    RandomPruning,
    drawn,
    erdos_renyi,
    grasp_scores,
    left_of,
    uniform_plus,
)
from tests.contract.families import WEIGHT_FAMILIES, images

SHAPES = [(8, 3, 3, 3), (16, 8, 3, 3), (32, 16, 1, 1), (10, 32)]
SIZES = [216, 1152, 512, 320]
RECIPE = Recipe(steps=2, batch=4, rate=0.0, check_every=2, save_every=2)


def objective(model, batch):
    logits = model(batch["pixel_values"])
    return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, batch["labels"]))


def samples():
    return [{"pixel_values": x, "labels": torch.tensor(i)} for i, x in enumerate(images("vgg"))]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.7, 1.0])
def test_er_and_erk_meet_the_budget_and_no_layer_exceeds_itself(kernel, keep):
    found = erdos_renyi(SHAPES, keep, kernel)
    assert sum(d * n for d, n in zip(found, SIZES, strict=True)) == pytest.approx(keep * sum(SIZES))
    assert max(found) <= 1
    fixed = erdos_renyi(SHAPES, 0.4, kernel, fixed={3: 0.5})
    assert fixed[3] == 0.5 and sum(d * n for d, n in zip(fixed, SIZES, strict=True)) == pytest.approx(0.4 * sum(SIZES))


def test_layers_of_one_proportion_become_dense_together():
    shapes = [(4, 4), (4, 4), (64, 64)]
    assert erdos_renyi(shapes, 0.1)[:2] == [1.0, 1.0]
    with pytest.raises(PrunelabError, match="keep more"):
        erdos_renyi(shapes, 0.1, fixed={2: 1.0})


def test_uniform_plus_keeps_less_than_asked_for():
    found = uniform_plus(SIZES, 0.15)
    assert found[0] == 1 and found[-1] == 0.2
    assert sum(d * n for d, n in zip(found, SIZES, strict=True)) < 0.15 * sum(SIZES)
    assert uniform_plus(SIZES, 0.2) == [1.0, 0.2, 0.2, 0.2]
    with pytest.raises(PrunelabError, match="keep more"):
        uniform_plus(SIZES, 0.05)


def test_no_layer_is_left_empty_and_ties_stay():
    masks = drawn([(5, 5), (3,)], [1e-9, 0.0], torch.Generator().manual_seed(0))
    assert [int(m.sum()) for m in masks] == [1, 1]
    assert left_of([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])], 0.25) == [0.5, 0.5]
    with pytest.raises(PrunelabError, match="is none"):
        left_of([torch.ones(3)], 0.1)


def test_grasp_is_the_weight_times_hessian_times_gradient():
    w = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    h = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]])
    (g,) = torch.autograd.grad(0.5 * w @ h @ w, w, create_graph=True)
    assert torch.allclose(grasp_scores([w], [g])[0], w.detach() * (h @ (h @ w.detach())))


@pytest.mark.parametrize("ratio", ["snip", "grasp"])
def test_a_criterion_leaves_weights_and_statistics_as_they_were(ratio):
    model, dense = WEIGHT_FAMILIES["vgg"](), WEIGHT_FAMILIES["vgg"]()
    plan = train(RandomPruning(ratio), model, 0.4, samples(), RECIPE, objective=objective, progress=False)
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert bool(((p == q) | (p == 0)).all()), name
    kept = [float(d.mask.float().mean()) for t, d in plan.decisions() if t.unit == "linear"]
    assert len(set(kept)) > 1 and min(kept) > 0
    seen = [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(seen) == {RECIPE.steps}, "the trial left no trace in the running statistics"


def test_bad_input_is_named():
    with pytest.raises(PrunelabError, match="last must be a number above 0"):
        RandomPruning(last=0.0)
    with pytest.raises(PrunelabError, match="one share of all weights"):
        train(RandomPruning(), WEIGHT_FAMILIES["vgg"](), Budget(3, "count"), samples(), RECIPE,
              objective=objective, progress=False)  # fmt: skip


def test_a_layer_that_lots_leave_empty_keeps_one_weight_unless_as_released():
    rescued, bare = (drawn([(4, 4)], [0.0], torch.Generator().manual_seed(0), least)[0] for least in (True, False))
    assert int(rescued.sum()) == 1 and int(bare.sum()) == 0
