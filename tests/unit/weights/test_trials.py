"""What a probe tries out is what pruning would do, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import masks
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.targets import Decision
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids, vit


def probe(model, unit, samples):
    adapter = weight_adapter(model)
    return ModelProbe(adapter, adapter.targets(unit), samples)


def chance(targets, keep, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [(t, Decision(masks.per_row(torch.rand(t.shape, generator=draws), Budget(keep)))) for t in targets]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["phi", "gpt2", "gpt_neox", "phi3", "gemma", "deepseek_v3"])
@pytest.mark.parametrize("unit", ["linear", "heads", "channels"])
def test_a_trial_computes_what_the_pruned_model_does(family, unit):
    model = WEIGHT_FAMILIES[family]()
    tried = probe(model, unit, list(token_ids()))
    decisions, before = chance(tried.targets, 0.5), state(model)
    with torch.no_grad():
        with tried.trial(decisions):
            seen = tried.logits(token_ids()[0])
        pruned = copy.deepcopy(model)
        adapter = weight_adapter(pruned)
        for target, decision in decisions:
            adapter.write(target, decision)
        want = adapter.run(token_ids()[0]).logits[0]
    assert torch.allclose(seen, want, atol=1e-5)
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_trial_of_a_layer_passes_it_by_and_a_new_bias_leaves_again():
    model = language_model()
    layers, channels = probe(model, "layers", []), probe(model, "channels", [])
    bias = {"down.bias": torch.ones(32)}
    cut = [(layers.targets[1], Decision(torch.zeros(1, dtype=torch.bool)))]
    grown = [(channels.targets[0], Decision(torch.ones(40, dtype=torch.bool), bias))]
    before, ids = state(model), token_ids()[0]
    with torch.no_grad():
        with layers.trial(cut):
            seen = layers.logits(ids)
        shallow = copy.deepcopy(model)
        adapter = weight_adapter(shallow)
        adapter.write(*cut[0])
        adapter.finish()
        assert torch.allclose(seen, adapter.run(ids).logits[0], atol=1e-5)
        dense = channels.logits(ids)
        with channels.trial(grown):
            assert not torch.allclose(channels.logits(ids), dense)
    assert state(model).keys() == before.keys() and not channels.adapter.reshaped


def test_a_trial_that_fails_leaves_no_trace():
    model = vit()
    tried = probe(model, "linear", [])
    before = state(model)
    with pytest.raises(RuntimeError, match="broke"), tried.trial(chance(tried.targets, 0.5)):
        raise RuntimeError("broke")
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


def test_experts_are_not_tried():
    tried = probe(language_model("mixtral"), "experts", [])
    with pytest.raises(PrunelabError, match=r"cannot be set to zero"), tried.trial(chance(tried.targets, 0.5)):
        pass
