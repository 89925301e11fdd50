"""Sparse pre-training: when weights leave, which, and the law."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.training.engine import train
from prunelab.common.training.recipe import Recipe
from prunelab.methods.sparse_pretraining.method import (
    SparsePretraining,
    average_parameters,
    events,
    fitted,
    keep_fractions,
    law,
    pruned,
)
from tests.contract.references import language_model, token_ids

RECIPE = Recipe(steps=20, batch=4, rate=1e-3, check_every=20, save_every=20)


def run(method: SparsePretraining, keep=0.5, **options):
    model = language_model()
    return model, train(method, model, keep, token_ids(16), RECIPE, progress=False, **options)


def test_every_cut_takes_the_same_share_of_what_is_left():
    assert events(300, 800, 100) == [300, 400, 500, 600, 700, 800] and events(100, 100, 50) == [100]
    found = keep_fractions(0.4, 6)
    assert found[-1] == pytest.approx(0.4) and np.allclose(np.diff(np.log(found)), np.log(found[0]))
    method = SparsePretraining(0.25, 0.75, every=2)
    assert method.steps(20) == [5, 7, 9, 11, 13, 15]
    schedule = method.schedule(20)
    wanted = [1.0] * 5 + [k for k in keep_fractions(0.5, 6) for _ in range(2)]
    assert [schedule.budget(s, Budget(0.5)).amounts[0] for s in range(16)] == pytest.approx(wanted[:16])


def test_average_parameters_follow_the_schedule():
    model, plan = run(SparsePretraining(0.25, 0.75, every=2), 0.5)
    whole = sum(t.units for t, d in plan.decisions() if not bool(d.mask.all()))
    kept = [1.0] * 5 + [k for k in keep_fractions(0.5, 6) for _ in range(2)]
    kept += [0.5] * (20 - len(kept))
    absent = plan.report.dense_parameters - plan.report.average_parameters
    assert absent == pytest.approx(whole * (1 - average_parameters(kept[:20])), rel=2e-2)
    assert model.lm_head.weight.eq(0).any()
    spared = run(SparsePretraining(0.25, 0.75, every=2, head=False, skip=("q_proj",)), 0.5)[0]
    assert not spared.lm_head.weight.eq(0).any() and not spared.model.layers[0].self_attn.q_proj.weight.eq(0).any()
    assert spared.model.layers[0].self_attn.k_proj.weight.eq(0).any()


def test_what_has_left_never_returns_and_ties_stay():
    scores = [torch.tensor([0.0, 1.0, 1.0, 2.0])]
    assert pruned(scores, 0.5)[0][0].tolist() == [False, True, True, True]
    assert pruned(scores, 1.0)[0][0].all()
    kept, threshold = pruned([torch.arange(8.0)], 0.5, pattern=True)
    assert kept[0].tolist() == [False, False, True, True] * 2 and threshold == 5
    assert pruned([torch.arange(8.0)], 0.25, pattern=True)[0][0].sum() == 4, "no more than half can go"
    assert pruned([torch.arange(8.0)], 1.0, pattern=True)[0][0].all()
    with pytest.raises(PrunelabError, match="groups of four"):
        pruned([torch.ones(6)], 0.5, pattern=True)


@pytest.mark.parametrize(("layout", "axis"), [("kernel", 0), ("weight", 1)])
def test_the_pattern_lies_along_outputs_or_inputs(layout, axis):
    model, _ = run(SparsePretraining(0.25, 0.75, every=2, pattern=True, layout=layout, head=False))
    weight = model.model.layers[1].mlp.up_proj.weight
    groups = (weight if axis else weight.T).reshape(-1, 4)
    assert bool((groups.ne(0).sum(1) >= 2).all()) and bool(groups.eq(0).any())


def test_random_masks_are_others():
    by_lot = SparsePretraining(0.25, 0.75, every=5, criterion="random")
    plans = [run(by_lot, seed=0)[1], run(by_lot, seed=0)[1], run(by_lot, seed=1)[1]]
    masks = [torch.cat([d.mask.flatten() for _, d in plan.decisions()]) for plan in plans]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_the_fit_finds_a_law_that_is_there():
    n = np.array([1e4, 3e4, 1e5, 3e5, 1e6])
    d = np.full(5, 1e6)
    loss = law(n, d, 1.7, 40.0, 0.0, 0.35, 1.0)
    found = fitted(n, d, loss)
    assert np.allclose(law(n, d, **found), loss, rtol=2e-3)
    many = np.repeat(n, 3), np.tile([1e5, 1e6, 1e7], 5)
    loss = law(*many, 1.7, 40.0, 300.0, 0.35, 0.4)
    assert np.allclose(law(*many, **fitted(*many, loss)), loss, rtol=1e-2)


def test_bad_input_is_named():
    with pytest.raises(PrunelabError, match="before"):
        SparsePretraining(0.8, 0.2)
    with pytest.raises(PrunelabError, match="one share of all weights"):
        run(SparsePretraining(), (0.5, 0.5, 0.5))
    with pytest.raises(PrunelabError, match="sparse_pretraining: every"):
        SparsePretraining(every=0)
