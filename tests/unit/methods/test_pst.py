"""PST beyond the golden cases: what learns, how much goes when, bad input."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.training import engine
from prunelab.common.training.recipe import Recipe
from prunelab.methods.pst.method import PST, SparseWeight
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids

RECIPE = Recipe(steps=10, batch=4, rate=1e-2)


def test_it_starts_as_magnitude_pruning_of_the_whole_matrix():
    module, weight = SparseWeight((6, 8), 2, 2, 1, 1, 1), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    module.gone = 20
    kept = module(weight) != 0
    assert int((~kept).sum()) == 20 and weight[~kept].abs().max() < weight[kept].abs().min()
    module.gone = 0
    assert torch.equal(module(weight), weight)


def test_weights_of_blocks_are_changed_by_low_rank_alone_and_the_rest_is_frozen():
    model, dense = language_model(), language_model()
    plan = engine.train(PST(rank=2), model, 1.0, token_ids(16), RECIPE, progress=False)
    pruned = {t.name for t in plan.targets if t.unit == "linear"}
    for name, module in model.named_modules():
        if name in pruned:
            moved = module.weight - dense.get_submodule(name).weight
            assert 1 <= int(torch.linalg.matrix_rank(moved.detach(), rtol=1e-3)) <= 2
    frozen = {n: p for n, p in dense.named_parameters() if n.removesuffix(".weight") not in pruned}
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


def test_every_matrix_loses_its_share_and_nothing_goes_before_the_warm_up(monkeypatch):
    seen = []
    original = PST.before_step

    def noting(self, batch, training):
        original(self, batch, training)
        seen.append(self.weight(training.targets[0], training).gone)

    monkeypatch.setattr(PST, "before_step", noting)
    plan = engine.train(PST(), language_model(), 0.3, token_ids(16), RECIPE, progress=False)
    assert seen[:2] == [0, 0] and seen == sorted(seen) and seen[7:] == [int(0.7 * 32 * 32)] * 3
    for target, decision in plan.decisions():
        if target.unit == "linear":
            assert int((~decision.mask).sum()) == int(round(0.7 * target.units, 6))


def test_classifier_heads_are_trained_along():
    model = WEIGHT_FAMILIES["bert"]()
    names = [name for name, _ in model.named_parameters()]
    chosen = PST(trains=("cls.predictions.bias",)).trainable(names, type("T", (), {"targets": []})())
    assert chosen == ["cls.predictions.bias"]


def test_bad_input_is_refused():
    with pytest.raises(PrunelabError, match="do not fit a weight of 4 x 9"):
        SparseWeight((4, 9), 2, 5, 1, 1, 1)
    with pytest.raises(PrunelabError, match="before it begins"):
        engine.train(PST(warmup=0.9), language_model(), 0.5, token_ids(16), RECIPE, progress=False)
    with pytest.raises(PrunelabError, match="give a ratio"):
        engine.train(PST(), language_model(), "2:4", token_ids(16), RECIPE, progress=False)
