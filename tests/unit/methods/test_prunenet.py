"""PruneNet: distances, what the policy learns, its second use, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.methods.prunenet.method import (
    Policy,
    PruneNet,
    divergence,
    keep_logits,
    kolmogorov_smirnov,
    reward,
    rounded,
)
from tests.contract.references import language_model


@pytest.mark.parametrize("sizes", [(1, 1), (5, 9), (40, 24)])
def test_the_distance_is_scipys(sizes):
    draws = np.random.default_rng(0)
    a, b = (draws.integers(0, 6, size).astype(float) for size in sizes)  # with ties
    found = kolmogorov_smirnov(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(ks_2samp(a, b).statistic, abs=1e-12)


def test_rewards_and_probabilities_at_their_edges():
    weight = torch.eye(6)
    assert reward(torch.linalg.svdvals(weight), weight[:3]) == 99999, "the same values, whatever their number"
    noise = torch.tensor([0.1, 0.5, 0.9, 0.3])
    assert torch.allclose(torch.sigmoid(keep_logits(torch.zeros(4), noise)), noise)
    assert (
        float(divergence(torch.zeros(4))) == pytest.approx(0, abs=1e-6) and float(divergence(torch.tensor([2.0]))) > 0
    )
    assert Policy(8, 4)(torch.randn(8, 4)).shape == (8,)


def test_a_policy_learns_and_serves_another_model():
    options = {"episodes": 3, "sample": False}
    plan = prune(PruneNet(**options), language_model(), 0.5, progress=False)
    fresh = PruneNet(**options).build([target for target, _ in plan.decisions()])
    assert {name: tuple(t.shape) for name, t in plan.learned.items()} == {
        name: tuple(t.shape) for name, t in fresh.state_dict().items()
    }
    longer = prune(PruneNet(episodes=6, sample=False), language_model(), 0.5, progress=False)
    assert not torch.equal(plan.learned["proj.weight"], longer.learned["proj.weight"])
    again = prune(PruneNet(**options), language_model(seed=3), 0.75, learned=plan.learned, progress=False)
    assert torch.equal(again.learned["proj.weight"], plan.learned["proj.weight"]), "nothing was trained"
    assert [d.kept for _, d in again.decisions()] == [30] * 3


def test_sampling_best_policies_and_divergence_are_options():
    plans = {
        name: prune(method, language_model(), 0.5, progress=False)
        for name, method in {
            "drawn": PruneNet(episodes=2), "probable": PruneNet(episodes=2, sample=False),
            "best": PruneNet(episodes=4, best=True), "last": PruneNet(episodes=4),
            "apart": PruneNet(episodes=2, divergence_weight=1.0),
        }.items()
    }  # fmt: skip
    assert plans["drawn"].diff(plans["probable"]) != "the plans are equal"
    assert not torch.equal(plans["best"].learned["proj.bias"], plans["last"].learned["proj.bias"])
    assert not torch.equal(plans["apart"].learned["proj.bias"], plans["drawn"].learned["proj.bias"])


def test_attention_is_not_touched_and_no_data_are_needed():
    model, dense = language_model(), language_model()
    prune(PruneNet(episodes=1), model, 0.5, progress=False)
    for name, p in dense.named_parameters():
        assert "mlp" in name or torch.equal(p, model.get_parameter(name))


def test_bad_input_is_named():
    for wrong in ({"episodes": 0}, {"rate": 0.0}, {"gamma": 0.0}):
        with pytest.raises(PrunelabError, match="prunenet"):
            PruneNet(**wrong)
    pruned = language_model()
    prune(PruneNet(episodes=1), pruned, (0.5, 0.75, 0.5), progress=False)
    with pytest.raises(PrunelabError, match="differ in shape"):
        prune(PruneNet(episodes=1), pruned, 0.5, progress=False)
    with pytest.raises(PrunelabError, match="keep more"):
        prune(PruneNet(episodes=1), language_model(), 0.001, progress=False)
    plan = prune(PruneNet(episodes=1), language_model(), 0.5, progress=False)
    with pytest.raises(PrunelabError, match="other shapes"):
        prune(PruneNet(episodes=1), language_model(intermediate_size=24), 0.5, learned=plan.learned, progress=False)


def test_large_weights_do_not_break_the_policy():
    model = language_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(1e3)
    plan = prune(PruneNet(episodes=4, divergence_weight=1.0), model, 0.5, progress=False)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in plan.learned.values())


def test_rounded_probabilities_have_the_released_infinite_loss():
    alpha = torch.tensor([200.0, -200.0, 0.3])
    assert torch.isinf(rounded(alpha)[:2]).all() and float(rounded(alpha)[2]) == pytest.approx(0.3, rel=1e-5)
    assert torch.isinf(divergence(rounded(alpha))) and torch.isfinite(divergence(alpha))
    plans = [
        prune(PruneNet(episodes=1, saturates=r, sample=False), language_model(), 0.5, progress=False)
        for r in (False, True)
    ]
    first, second = ([d.mask for _, d in plan.decisions()] for plan in plans)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "nothing rounds here"
