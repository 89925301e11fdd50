"""IST beyond its golden cases: draws, damping that leaves no trace, factors of peft, and what learns."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training import engine
from prunelab.common.training.recipe import Recipe
from prunelab.methods.ist.method import IST, draw, draw_apart, updated
from tests.contract.references import language_model, token_ids

RECIPE = Recipe(steps=12, batch=4, rate=1e-2, check_every=12)


def test_layers_are_drawn_by_their_weights():
    rng = torch.Generator().manual_seed(0)
    masks = torch.stack([draw(torch.tensor([1.0, 3.0, 0.0, 4.0]), 1, rng) for _ in range(4000)]).float().mean(0)
    assert (masks - torch.tensor([0.125, 0.375, 0, 0.5])).abs().max() < 0.03


def test_trials_differ_while_they_can():
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        masks = draw_apart(torch.ones(4), 2, 3, rng)
        assert len({tuple(mask.tolist()) for mask in masks}) == 3 and masks.sum(1).tolist() == [2, 2, 2]
    assert len(draw_apart(torch.ones(2), 1, 3, rng)) == 3, "two choices, three trials"
    assert draw_apart(torch.ones(1), 1, 3, rng).tolist() == [[True]] * 3


def test_layers_that_can_be_damped_gain_and_others_stay():
    damped = torch.tensor([[True, False, False], [False, True, False]])
    scores = updated(torch.zeros(3), damped, torch.tensor([1.0, 2.0]))
    assert float(scores[0]) > 0 > float(scores[1]) and float(scores[2]) == 0
    assert torch.equal(updated(torch.ones(3), damped, torch.tensor([900.0, 900.0])), torch.ones(3))


def test_only_factors_of_the_drawn_layers_learn_and_damping_leaves_no_trace(monkeypatch):
    seen, gains = [], []
    step, tried = IST.trainable, IST.tried

    def trainable(self, names, training):
        chosen = step(self, names, training)
        seen.append({name.split(".")[2] for name in chosen})
        gains.extend(training.low_rank(target).gain for target in training.targets)
        return chosen

    def counted(self, mask, batch, training):
        loss = tried(self, mask, batch, training)
        assert not training.model.training or bool(loss.isfinite())
        return loss

    monkeypatch.setattr(IST, "trainable", trainable)
    monkeypatch.setattr(IST, "tried", counted)
    model = language_model()
    engine.train(IST(rank=2, interval=4), model, 0.34, token_ids(16), RECIPE, progress=False)
    assert len(seen) == 12 and all(len(layers) == 1 for layers in seen) and len(set().union(*seen)) > 1
    assert set(gains) == {1.0}


def test_factors_of_peft_are_used():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    plain = language_model()
    model = peft.get_peft_model(language_model(), config)
    engine.train(IST(roles=("q_proj", "v_proj"), interval=4), model, 0.34, token_ids(16), RECIPE, progress=False)
    moved = [
        n for n, p in model.get_base_model().named_parameters() if not torch.equal(p, dict(plain.named_parameters())[n])
    ]
    assert moved and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in moved)


def test_bad_input_is_one_line():
    with pytest.raises(PrunelabError, match="interval and trials"):
        engine.train(IST(trials=0), language_model(), 0.34, token_ids(16), RECIPE, progress=False)
    with pytest.raises(PrunelabError, match="covers none"):
        engine.train(IST(roles=("other",)), language_model(), 0.34, token_ids(16), RECIPE, progress=False)
