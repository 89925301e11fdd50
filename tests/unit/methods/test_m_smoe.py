"""M-SMoE beyond the golden cases: shared experts compute what equal ones do, sizes, disk, edges."""

from __future__ import annotations

import copy

import pytest
import torch

from prunelab.common.core.errors import PrunelabError
from prunelab.common.experts import applied
from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.merging import aligned, in_one_order, merged
from prunelab.methods.m_smoe.method import MSMoE, group_counts, grouped
from tests.contract.caches_references import WeakestExperts
from tests.contract.references import language_model, token_ids


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(2, seed=9) if ids is None else ids).logits


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_shared_experts_compute_what_equal_ones_do(family, implementation):
    model = language_model(family)
    equal = copy.deepcopy(model)
    plan = prune(MSMoE(), model, 0.5, token_ids(), progress=False)
    merges = 0
    for target, decision in plan.decisions():
        share = decision.share
        if share is None:
            continue
        merges += 1
        experts = equal.get_submodule(target.name)
        with torch.no_grad():
            experts.gate_up_proj.copy_(decision.values["gate_up"][share])
            experts.down_proj.copy_(decision.values["down"][share])
        assert model.get_submodule(target.name).num_experts == decision.kept < target.units
    assert merges
    for each in (model, equal):
        each.set_experts_implementation(implementation)
    assert torch.allclose(logits(model), logits(equal), atol=1e-5)


def test_merged_models_are_counted_and_come_back_from_disk(tmp_path):
    model = language_model("mixtral")
    plan = prune(MSMoE(scope="layer"), model, 0.5, token_ids(), progress=False)
    report = plan.report
    assert report.dense_parameters - report.parameters == report.removed
    assert not plan.header["stock"]
    save_pruned(model, plan, tmp_path)
    assert torch.allclose(logits(load_pruned(tmp_path)), logits(model), atol=1e-5)
    dense = language_model("mixtral")
    WeightPlan.load(tmp_path / "plan").apply(dense)
    assert torch.equal(logits(dense), logits(model))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    grown = model.generate(token_ids(1), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert grown.shape[1] >= 13


def test_experts_may_still_be_left_out_at_run_time():
    model = language_model("mixtral")
    prune(MSMoE(), model, 0.5, token_ids(), progress=False)
    before = logits(model)
    with applied(WeakestExperts(), model, 0.5) as handle:
        assert not torch.allclose(logits(model), before)
    assert handle.report().ratio == pytest.approx(0.5, abs=0.05)
    assert torch.equal(logits(model), before)


def test_layers_that_are_left_out_keep_all_experts():
    plan = prune(MSMoE(layers=(1,)), language_model("mixtral"), 0.5, token_ids(), progress=False)
    kept = [decision.kept for _, decision in plan.decisions()]
    assert kept[0] == kept[2] == 4 and kept[1] < 4
    with pytest.raises(PrunelabError, match="count from 0 to 2"):
        prune(MSMoE(layers=(7,)), language_model("mixtral"), 0.5, token_ids(), progress=False)


@pytest.mark.parametrize("similarity", ["router-logits", "router-weight", "weight"])
def test_alike_experts_are_merged_first(similarity):
    model = language_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = layer.mlp.gate.weight[1]
            for part in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                part[3] = part[1]
    plan = prune(MSMoE(similarity, scope="layer"), model, 0.75, token_ids(), progress=False)
    for _, decision in plan.decisions():
        led = decision.share
        assert int(led[3]) == int(led[1]) or {1, 3} <= set(led.tolist())  # both may lead, being used most


def test_neurons_in_another_order_are_the_same_expert():
    g = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(2, 12, 8, generator=g), torch.randn(2, 8, 6, generator=g)
    order = torch.randperm(6, generator=g)
    gate_up[1], down[1] = gate_up[0][torch.cat([order, 6 + order])], down[0][:, order]
    back = aligned([gate_up[0, :6]], [gate_up[1, :6]])
    assert torch.equal(gate_up[1, :6][back], gate_up[0, :6])
    one, other = in_one_order(gate_up, down, torch.tensor([0, 0]))
    assert torch.equal(one[1], gate_up[0]) and torch.equal(other[1], down[0])


def test_edges_of_grouping_and_merging():
    usage = torch.tensor([[0.5, 0.4, 0.1], [0.4, 0.4, 0.2]])
    assert group_counts(usage, 3, [0, 1]).tolist() == [1, 1]  # 0.4 at the threshold is not above it
    assert group_counts(usage, 6, [0, 1]).tolist() == [2, 3]  # asked for all, the release still merges
    with pytest.raises(PrunelabError, match="fewer groups than layers"):
        group_counts(usage, 1, [0, 1])
    labels, dominant = grouped(torch.tensor([[1, 0.2, 0.9], [0.2, 1, 0.3], [0.9, 0.3, 1]]), usage[0], 2)
    assert labels.tolist() == [0, 1, 0] and dominant.tolist() == [0, 1]
    part = torch.tensor([[1.0], [3.0], [7.0]])
    assert merged(part, torch.tensor([0, 0, 1]), torch.tensor([0.0, 0, 1])).flatten().tolist() == pytest.approx(
        [2, 2, 7]
    )
