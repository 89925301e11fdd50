"""FLAP against brute force: what its score measures, its thresholds, its counts and its bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.role import WeightPruner
from prunelab.common.weights.targets import Target, WeightSignals
from prunelab.methods.flap.method import FLAP, MagnitudeSP, Variance, WandaSP, above, common_threshold, importance
from tests.contract.families import WEIGHT_FAMILIES, answer, images
from tests.contract.references import language_model, token_ids

fast = settings(max_examples=50, deadline=None)


class Seen:
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


def sequences(channels: int = 6) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.1, 2, channels)
    return [torch.randn(n, channels, generator=g) * scales + 3 for n in (5, 1, 0, 9)]


def variance(inputs: list[Tensor]) -> Tensor:
    accumulator = Variance(None)
    for sequence in inputs:
        accumulator.update(Seen(sequence))
    return accumulator.value()


def test_variance_is_that_of_all_tokens():
    assert torch.allclose(variance(sequences()), torch.cat(sequences()).var(0), rtol=1e-5)


def test_the_papers_score_is_the_error_that_the_best_constant_leaves():
    """Prune one channel, fit the best constant in its place by least squares: the squared error is what WIFV says."""
    x = torch.cat(sequences()).double()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    scores = importance("WIFV", weight, variance(sequences()))
    for channel in range(6):
        lost = x[:, channel, None] * weight[:, channel]  # what the outputs miss, [T, D]
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        constant = torch.linalg.lstsq(ones, lost).solution
        error = (lost - ones @ constant).square().sum() / (len(x) - 1)
        assert float(scores[channel]) == pytest.approx(float(error), rel=1e-4)


def test_the_bias_is_the_best_constant_and_adds_to_one_that_is_there():
    x, weight = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) + 1, torch.arange(24.0).view(4, 6)
    mask = torch.tensor([True, False, True])  # heads of two channels
    target = Target("heads", "attention", 0, "heads", (3,), 8, 2)
    statistics = {"input_mean": x.mean(0)}
    bias = FLAP().update(target, WeightSignals({"o": weight}, statistics), mask)["o.bias"]
    lost = x[:, 2:4] @ weight[:, 2:4].T
    assert torch.allclose(bias, lost.mean(0), rtol=1e-4)
    given_bias = torch.ones(4)
    both = FLAP().update(target, WeightSignals({"o": weight, "o.bias": given_bias}, statistics), mask)["o.bias"]
    assert torch.allclose(both, bias + 1)
    assert FLAP(compensate=False).update(target, WeightSignals({"o": weight}), mask) == {}


@fast
@given(
    scores=st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    share=st.floats(0.05, 0.95),
    inclusive=st.booleans(),
    data=st.data(),
)
def test_the_common_threshold_by_trying_all(scores, share, inclusive, data):
    costs = data.draw(st.lists(st.integers(1, 9), min_size=len(scores), max_size=len(scores)))
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    nearest, threshold = float("inf"), 0
    for place in range(len(ranked)):
        distance = abs(sum(costs[i] for i in ranked[: place + 1]) - share * sum(costs))
        if distance < nearest:
            nearest, threshold = distance, scores[ranked[place]]
    want = [s >= threshold if inclusive else s > threshold for s in scores]
    given = torch.tensor(scores).float()
    got = above(given, common_threshold(given, torch.tensor(costs).float(), share), inclusive)
    assert got.tolist() == want


def kept(plan: WeightPlan, unit: str) -> list[int]:
    return [decision.kept for target, decision in plan.decisions() if target.unit == unit]


def gone(plan: WeightPlan) -> float:
    """Share of the prunable parameters that went."""
    lost = sum((t.units - d.kept) * t.size for t, d in plan.decisions())
    return lost / sum(t.parameters for t, _ in plan.decisions())


@pytest.mark.parametrize("family", ["llama", "llama_mha", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5])
def test_the_papers_threshold_meets_the_budget_to_half_a_unit(family, ratio):
    plan = prune(FLAP(released=False), language_model(family), ratio, token_ids(8), progress=False)
    largest = max(target.size for target, _ in plan.decisions())
    total = sum(target.parameters for target, _ in plan.decisions())
    assert abs(gone(plan) - (1 - ratio)) <= largest / total / 2 + 1e-6


def test_grouped_queries_count_and_leave_with_their_keys():
    """A group of two query heads and one key-value head of size 8 costs as many neurons as its parameters make."""
    model, dense = language_model(), language_model()
    plan = prune(FLAP(), model, 0.7, token_ids(8), progress=False)
    heads, neurons = (weight_adapter(dense).targets(unit)[0] for unit in ("heads", "channels"))
    assert FLAP()._costs([heads, neurons])[0][1] == (2 * 8 * 2 + 2 * 8) * 32 // (3 * 32) == 16
    assert FLAP(released=False)._costs([heads, neurons])[0][1] == 48 / 3
    with torch.no_grad():  # the same by zeros and biases in the dense model
        for target, decision in plan.decisions():
            columns = decision.mask.repeat_interleave(target.span)
            part = dense.get_submodule(target.name)
            linear = part.o_proj if target.unit == "heads" else part.down_proj
            linear.weight[:, ~columns] = 0
            for role, bias in decision.values.items():
                assert role in ("o.bias", "down.bias")
                linear.bias = nn.Parameter(bias)
        ids = token_ids(2, seed=9)
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)
    assert (
        sum(kept(plan, "channels")) < 120 and model.generate(ids[:1], max_new_tokens=2, pad_token_id=0).shape[1] >= 13
    )


def test_heads_and_neurons_apart_and_layer_by_layer():
    ids = token_ids(8)
    plan = prune(FLAP("AL-MM", removed_heads=3), language_model("llama_mha"), 0.7, ids, progress=False)
    assert sum(kept(plan, "heads")) == 12 - 3
    assert 120 - sum(kept(plan, "channels")) == int((0.3 * (12 * 1024 + 120 * 96) - 3 * 1024) / 96)
    plan = prune(FLAP("UL-MM", removed_heads=3), language_model("llama_mha"), 0.7, ids, progress=False)
    assert kept(plan, "heads") == [3, 3, 3]
    assert kept(plan, "channels") == [40 - int((0.3 * (4096 + 3840) - 1024) / 96)] * 3
    plan = prune(FLAP("UL-UM"), language_model("llama_mha"), Budget((1.0, 0.5, 0.7)), ids, progress=False)
    assert kept(plan, "heads") == [4, 2, 3] and kept(plan, "channels") == [40, 20, 28]


@torch.no_grad()
def inputs_of(model: nn.Module, linear: nn.Module, ids: Tensor) -> list[Tensor]:
    """What a linear reads of each sequence, from a run of the whole model."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for sequence in ids:
        model(sequence[None])
    handle.remove()
    return seen


def test_uniform_layers_keep_the_best_of_each_by_a_plain_loop():
    model, dense, ids = language_model("llama_mha"), language_model("llama_mha"), token_ids(6)
    plan = prune(FLAP("UL-UM"), model, 0.5, ids, progress=False)
    for block, layer in enumerate(dense.model.layers):
        for linear, name, size in ((layer.self_attn.o_proj, "self_attn", 8), (layer.mlp.down_proj, "mlp", 1)):
            mean, fluctuation = torch.zeros(linear.in_features), torch.zeros(linear.in_features)
            for n, x in enumerate(inputs_of(dense, linear, ids), 1):
                mean = mean * (n - 1) / n + x.mean(0) / n
                if n > 1:
                    fluctuation = fluctuation * (n - 2) / (n - 1) + (x - mean).square().sum(0) / n
            scores = fluctuation * linear.weight.detach().square().sum(0)
            units = [float((s.square() if size > 1 else s).sum()) for s in scores.split(size)]
            best = sorted(sorted(range(len(units)), key=lambda i: -units[i])[: len(units) // 2])
            decision = plan.decision(f"model.layers.{block}.{name}")
            assert decision.mask.nonzero().flatten().tolist() == best


def output_error(method: WeightPruner, ratio: float = 0.6) -> float:
    model, dense, ids = language_model(num_hidden_layers=1), language_model(num_hidden_layers=1), token_ids(16)
    prune(method, model, ratio, ids, progress=False)
    with torch.no_grad():
        return float((model.model(ids).last_hidden_state - dense.model(ids).last_hidden_state).square().mean())


def test_the_bias_lowers_the_error():
    assert output_error(FLAP()) < output_error(FLAP(compensate=False))


def test_adaptive_plans_with_biases_come_back_from_disk(tmp_path):
    model = language_model()
    plan = prune(FLAP(), model, 0.6, token_ids(8), progress=False)
    save_pruned(model, plan, tmp_path)
    ids = token_ids(2, seed=9)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", [WandaSP(), MagnitudeSP()], ids=lambda m: m.name)
def test_the_baselines_by_a_plain_loop(method):
    model, pruned, ids = language_model("llama_mha"), language_model("llama_mha"), token_ids(4)
    plan = prune(method, pruned, 0.5, ids, progress=False)
    for block, layer in enumerate(model.model.layers):  # each layer on what the pruned layers before it give
        linears = ((layer.self_attn.o_proj, "self_attn", 8), (layer.mlp.down_proj, "mlp", 1))
        norms = [torch.stack([x.square().sum(0) for x in inputs_of(model, m, ids)]).mean(0) for m, _, _ in linears]
        with torch.no_grad():
            for (linear, name, size), norm in zip(linears, norms, strict=True):
                weight = linear.weight.abs()
                scores = (weight * norm.sqrt()).mean(0) if method.name == "wanda_sp" else weight.square().sum(0).sqrt()
                units = scores.view(-1, size).sum(1)
                worst = units.argsort()[: len(units) // 2]
                want = torch.ones_like(units, dtype=torch.bool).index_fill(0, worst, False)
                assert torch.equal(plan.decision(f"model.layers.{block}.{name}").mask, want)
                linear.weight[:, ~want.repeat_interleave(size)] = 0


def test_bad_options_and_budgets_are_named():
    for wrong in ({"removed_heads": 2}, {"structure": "AL-MM"}, {"structure": "UL-MM", "removed_heads": -1}):
        with pytest.raises(PrunelabError, match="removed_heads"):
            FLAP(**wrong)
    model, ids = language_model(), token_ids()
    before = [p.clone() for p in model.parameters()]

    def refused(match: str, method: WeightPruner, budget: object, calibration: Tensor = ids) -> None:
        with pytest.raises(PrunelabError, match=match):
            prune(method, model, budget, calibration, progress=False)

    refused("one share of the whole model, not 3count", FLAP(), "3count")
    refused("one share of the whole model", FLAP(), Budget((0.5, 0.5, 0.5)))
    refused("heads are more than the budget", FLAP("AL-MM", removed_heads=5), 0.9)
    refused("two sequences or more", FLAP(), 0.5, ids[:1])
    refused("would remove all heads of model.layers.0.self_attn; keep more", FLAP("AL-MM", removed_heads=6), 0.3)
    refused("would remove everything under 0; keep more", FLAP("UL-UM"), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(PrunelabError, match="prunes channels, and this MixtralForCausalLM has none"):
        prune(FLAP(), language_model("mixtral"), 0.5, ids, progress=False)


@pytest.mark.parametrize("family", ["vgg", "resnet", "efficientnet"])
def test_channels_of_convolutions_leave_their_mean_behind(family, tmp_path):
    dense, apart = answer(WEIGHT_FAMILIES[family](), family), {}
    for compensate in (True, False):
        model = WEIGHT_FAMILIES[family]()
        plan = prune(FLAP(prunes=("channels",), compensate=compensate), model, 0.7, images(family, 3), progress=False)
        apart[compensate] = float((answer(model, family) - dense).square().mean())
        plan.save(tmp_path)
        again = WEIGHT_FAMILIES[family]()
        WeightPlan.load(tmp_path).apply(again)
        assert torch.allclose(answer(again, family), answer(model, family), atol=1e-6)
    assert apart[True] < apart[False]


def test_a_constant_channel_of_a_convolution_leaves_without_a_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 2, 1))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 3
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(x)
        prune(Constant(prunes=("channels",)), model, 0.9, x, progress=False)
        assert model[0].out_channels == 3 and model[2].bias is not None
        assert torch.allclose(model(x), want, atol=1e-5)


class Constant(FLAP):
    """Takes the channel that never changes, and no other."""

    def select(self, targets, signals, scores, budget):
        return [torch.arange(t.units) != 2 if t.name == "0" else torch.ones(t.shape, dtype=torch.bool) for t in targets]


def test_what_flap_prunes_is_channels_with_or_without_heads():
    with pytest.raises(PrunelabError, match="prunes channels"):
        FLAP(prunes=("heads",))
    with pytest.raises(PrunelabError, match="prunes channels"):
        FLAP(structure="AL-MM", removed_heads=2, prunes=("channels",))


def test_of_two_places_equally_near_the_share_the_first_is_the_threshold():
    """0.55 of 90 neurons lies halfway between 49 and 50, though not in double precision."""
    scores = torch.arange(90.0, 0.0, -1.0)
    assert int((scores >= common_threshold(scores, torch.ones(90), 0.55)).sum()) == 49
