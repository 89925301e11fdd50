"""What a probe tries out is what pruning would do, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import masks, prefixes
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.common.weights.targets import Decision
from tests.contract.families import WEIGHT_FAMILIES
from tests.contract.references import language_model, token_ids, vit


def probe(model, unit, samples):
    adapter = weight_adapter(model)
    return ModelProbe(adapter, adapter.targets(unit), samples)


GONE = Decision(torch.zeros(1, dtype=torch.bool))


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


def test_a_run_takes_up_what_it_has_in_common_with_the_one_before(monkeypatch):
    monkeypatch.setattr(prefixes, "SHARE", 1e3)  # all states are kept
    model = language_model(num_hidden_layers=4)
    whole, kept = probe(model, "sublayers", list(token_ids())), probe(model, "sublayers", list(token_ids()))
    ran = []
    for index, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_hook(lambda *_, index=index: ran.append(index))
    (sample,) = kept.samples[:1]
    by_name = {target.name: target for target in kept.targets}
    tried = [[(2, "mlp")], [(3, "attention")], [(3, "attention"), (1, "mlp")], [(3, "attention"), (1, "mlp")], []]
    expected = [[0, 1, 3], [2, 3], [2, 3], [3], [1, 2, 3]]
    for gone, blocks in zip(tried, expected, strict=True):
        cut = [(next(t for t in by_name.values() if (t.block, t.role) == place), GONE) for place in gone]
        with torch.no_grad(), kept.trial(cut):
            ran.clear()
            again = kept.logits(sample)
            assert ran == blocks
            last = kept.final_state(sample)
        whole._prefixes = prefixes.Prefixes(whole.adapter, ())
        with torch.no_grad(), whole.trial(cut):
            assert torch.equal(whole.logits(sample), again) and torch.equal(whole.final_state(sample), last)
    with torch.no_grad():
        assert torch.equal(kept.hidden_states(sample)[-1], kept.final_state(sample))


def test_states_that_are_kept_take_a_share_of_what_the_weights_take():
    model = language_model(num_hidden_layers=4)
    kept = probe(model, "sublayers", list(token_ids()))
    room = sum(p.numel() * p.element_size() for p in model.parameters()) * prefixes.SHARE
    for sample in kept.samples:
        with torch.no_grad(), kept.trial([]):
            kept.logits(sample)
    states = [state for of_one in kept._prefixes._states.values() for state in of_one.values()]
    assert 0 < sum(state.numel() * state.element_size() for state in states) <= room


def test_no_state_is_kept_behind_a_change_that_no_other_trial_makes(monkeypatch):
    monkeypatch.setattr(prefixes, "SHARE", 1e3)
    tried = probe(language_model(num_hidden_layers=4), "linear", list(token_ids()))
    last = [target for target in tried.targets if target.block == 2]
    for targets, kept in ((tried.targets, set()), (last, {1, 2})):
        with torch.no_grad(), tried.trial(chance(targets, 0.5)):
            tried.logits(tried.samples[0])
        assert set(tried._prefixes._states[id(tried.samples[0])]) == kept
