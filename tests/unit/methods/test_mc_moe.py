"""MC-MoE beyond the golden cases: the programme against enumeration, bits of the model, dynamic pruning, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.common.tasks import get
from prunelab.common.weights import WeightPlan, prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.probe import ModelProbe
from prunelab.methods.mc_moe.allocation import allocated, by_blocks, costs, fake_quantised
from prunelab.methods.mc_moe.method import (
    LEAST_LOSS,
    MIXTRAL,
    MixtureCompressor,
    OnlineDynamicPruning,
    token_importance,
)
from prunelab.methods.mc_moe.tables import sizes
from tests.contract.references import language_model, token_ids


@pytest.mark.parametrize("experts", [2, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_programme_is_solved_exactly(experts, seed):
    cost, choices = torch.rand(experts, 3, generator=torch.Generator().manual_seed(seed)), (1, 2, 3)
    for total in range(5 if experts == 2 else experts + 3, 3 * experts + 1):
        every = [
            (sum(float(cost[e, b - 1]) for e, b in enumerate(bits)), list(bits))
            for bits in itertools.product(choices, repeat=experts)
            if sum(bits) <= total and 3 in bits and 2 in bits
        ]
        assert allocated(cost, choices, total) == min(every)[1]
    with pytest.raises(PrunelabError, match="do not suffice"):
        allocated(cost, choices, experts + 2)


def test_costs_are_of_shares():
    usage, mass, errors = torch.tensor([1.0, 3]), torch.tensor([2.0, 2]), torch.ones(2, 3)
    want = 1000 * torch.tensor([0.25, 0.75], dtype=torch.float64) * 0.5**1.5
    assert torch.allclose(costs(usage, mass, errors)[:, 0], want)
    assert torch.allclose(costs(usage, mass, 2 * errors, gamma=2)[:, 0], 4 * want)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
def test_experts_get_the_bits_that_the_budget_has(family, tmp_path):
    model = language_model(family)
    method = MixtureCompressor(group=8)
    plan = prune(method, model, "2.25bits", token_ids(), progress=False)
    for target, decision in plan.decisions():
        if target.unit == "experts":
            bits = [plan.decision(f"{target.name}.{e}.down").code.bits for e in range(target.units)]
            assert sum(bits) <= 2.25 * target.units and {2, 3} <= {*bits}
        elif target.expert < 0:
            assert decision.code.bits == 4
    plan.save(tmp_path)
    again = language_model(family)
    WeightPlan.load(tmp_path).apply(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(PrunelabError, match="do not suffice"):
        prune(method, language_model(family), "1.25bits", token_ids(), progress=False)


def test_an_expert_that_costs_more_gets_more_bits():
    cost = torch.tensor([[9.0, 4, 1], [0.9, 0.4, 0.1], [0.8, 0.35, 0.1], [0.09, 0.04, 0.01]])
    assert allocated(cost, (1, 2, 3), 7) == [3, 2, 1, 1]


def test_thresholds_take_second_experts_and_protected_tokens_keep_them():
    model, ids = language_model("mixtral"), token_ids(2, 20)
    ran = []
    for method in (
        OnlineDynamicPruning((1.0,) * 3, protect=0),
        OnlineDynamicPruning((1.0,) * 3, protect=0.1),
        OnlineDynamicPruning((0.0,) * 3),
        OnlineDynamicPruning((1.0,) * 3, protect=0, layers=(1,)),
        OnlineDynamicPruning((1.0,) * 3, protect=0, drop=0.1),
        OnlineDynamicPruning((1.0,) * 3, protect=0.1, importance="attention"),
    ):
        with torch.no_grad(), apply(method, model, 1.0) as handle:
            model(ids)
        ran.append(handle.report().run)
    assert ran[0] == (1.0,) * 3 and ran[1] == (1.1,) * 3 and ran[2] == (2.0,) * 3
    assert ran[3] == (2.0, 1.0, 2.0) and ran[4] == (0.9,) * 3 and ran[5] == (1.1,) * 3
    with torch.no_grad(), apply(OnlineDynamicPruning(), model, 0.75) as handle:
        model(ids)
    assert handle.report().ratio == pytest.approx(0.75)


def test_importance_is_of_real_tokens_and_each_sample_by_itself():
    norms, valid = torch.ones(1, 4), torch.tensor([[0, 1, 1, 1]])
    assert token_importance(norms, None, valid)[0, 1:].tolist() == pytest.approx([1 / 3, 1 / 2, 1])
    assert torch.equal(token_importance(norms, 2 * norms, valid), 2 * norms)
    model, ids = language_model("mixtral"), token_ids(2, 10)
    padded = torch.ones_like(ids)
    padded[0, :6] = 0
    with torch.no_grad(), apply(OnlineDynamicPruning((1.0,) * 3, protect=0.25), model, 1.0) as handle:
        model(ids, attention_mask=padded)
    assert handle.report().run == pytest.approx(((14 + 1 + 2) / 14,) * 3)  # 4 real tokens keep one, 10 keep two


def test_what_the_release_lists_is_of_one_model():
    assert len(MIXTRAL) == 32 and sorted(LEAST_LOSS) == list(range(32))
    with (
        pytest.raises(PrunelabError, match="do not reach mixture layer 1"),
        apply(OnlineDynamicPruning((0.5,)), language_model("mixtral"), 1.0),
    ):
        pass


def test_bad_options_are_refused():
    for options in ({"choices": (0, 2)}, {"least_one": (4,)}, {"batch": 0}, {"attention": 9}):
        with pytest.raises(PrunelabError):
            MixtureCompressor(**options)
    for options in ({"protect": 2}, {"drop": -1}, {"most": 0}):
        with pytest.raises(PrunelabError, match="odp"):
            OnlineDynamicPruning(**options)


def test_tables_name_expert_pruners_and_no_others():
    read = get("perplexity").read
    assert read({"length": 8, "experts": {"method": "odp", "budget": "0.75"}}).experts.budget == "0.75"
    for given, says in (
        ({"method": "wanda"}, "expert_pruner is wanted"),
        ({"method": "odp", "options": {"x": 1}}, "no option"),
    ):
        with pytest.raises(PrunelabError, match=says):
            read({"length": 8, "experts": given})


def test_sizes_are_those_of_the_architecture():
    found = sizes()
    assert found["T4 Mixtral-8x22B/16.00 bit/Params GB"]["value"] == pytest.approx(281.24, abs=0.01)
    assert found["T4 Mixtral-8x7B/Uniform 2.00/Params GB"]["value"] == pytest.approx(13.61, abs=0.05)


def bits_of(plan):
    return {
        target.name: [plan.decision(f"{target.name}.{e}.down").code.bits for e in range(target.units)]
        for target, _ in plan.decisions()
        if target.unit == "experts"
    }


def test_curvature_gives_bits_to_the_expert_whose_inputs_are_large():
    """An expert that is rounded worst and reads most gets the most bits; one that nobody asks gets the fewest."""
    model = language_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[1] *= 5
        experts.down_proj[1] *= 5
    found = bits_of(prune(MixtureCompressor(group=8, worth="hessian"), model, "2bits", token_ids(), progress=False))
    first = next(iter(found.values()))
    assert first[1] == 3 and sum(first) <= 2 * len(first)


def test_curvature_is_that_of_a_plain_count():
    model = language_model("mixtral")
    seen = {}
    layer = model.model.layers[0].mlp
    layer.experts.register_forward_pre_hook(lambda module, args: seen.setdefault("args", args))
    samples = token_ids(1)
    method = MixtureCompressor(group=8, worth="hessian")
    adapter = weight_adapter(model)
    with torch.no_grad():
        model(samples)
        target = adapter.targets("experts")[0]
        (cost, *_) = method.costs(ModelProbe(adapter, [target], list(samples)), [target])
    model.requires_grad_(False)
    inputs, chosen, _ = seen["args"]
    for expert in chosen.unique().tolist():
        own = inputs[(chosen == expert).any(-1)].double()
        gate_up, down = layer.experts.gate_up_proj[expert].double(), layer.experts.down_proj[expert].double()
        gate, up = (own @ gate_up.T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        for place, bits in enumerate((1, 2, 3)):
            want = sum(
                2 * (x.square().mean(-1).sum() / len(inputs)) * (fake_quantised(w.float(), bits, 8) - w).square().sum()
                for x, w in ((own, gate_up), (inner, down))
            )
            assert float(cost[expert, place]) == pytest.approx(float(want), rel=1e-4)


def test_whole_mixtures_have_two_bits_or_four():
    assert by_blocks([0.1, 0.4, 0.2, 0.3], 2.5) == [2, 4, 2, 2] and by_blocks([0.1, 0.4], 4) == [4, 4]
    with pytest.raises(PrunelabError, match="lies outside"):
        by_blocks([0.1], 1.5)
    model = language_model("mixtral", num_hidden_layers=4)
    found = bits_of(prune(MixtureCompressor(group=8, worth="blocks"), model, "2.5bits", token_ids(), progress=False))
    assert sorted(bits[0] for bits in found.values()) == [2, 2, 2, 4]


def test_the_error_has_the_exponent_of_usage_where_it_has_none_of_its_own():
    g = torch.Generator().manual_seed(0)
    usage, mass, errors = torch.rand(4, generator=g), torch.rand(4, generator=g), torch.rand(4, 3, generator=g)
    released = MixtureCompressor(alpha=2.0).cost(usage, mass, errors)
    assert torch.equal(released, costs(usage, mass, errors, 2.0, 1.5, 2.0))
    assert torch.equal(MixtureCompressor(gamma=2.0).cost(usage, mass, errors), costs(usage, mass, errors, 1, 1.5, 2.0))
