"""SPA: criteria of elements summed over coupled channels, OBSPA's solution, other libraries' groups, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.adapters.convnet import ConvNet
from prunelab.methods.spa.method import SPA, made_up_for, normalised, obs_elements
from tests.contract.families import WEIGHT_FAMILIES, answer, images
from tests.contract.references import language_model, token_ids

LABELS = torch.tensor([1, 4, 6])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).eval()


def pictures(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_a_group_sums_to_one_and_its_lowest_leave():
    found = normalised(torch.tensor([3.3, 0.5, 4.7, 1.5]), "sum")
    assert found.tolist() == pytest.approx([0.33, 0.05, 0.47, 0.15])
    assert normalised(torch.tensor([2.0, -2.0]), "mean").tolist() == [1.0, -1.0]
    assert normalised(torch.zeros(2), "max").tolist() == [0.0, 0.0]


def test_elements_are_summed_over_rows_and_columns():
    model = network()
    wanted = model[0].weight.abs().flatten(1).sum(1) + model[2].weight.abs().sum((0, 2, 3))
    plan = prune(SPA(local=True, normalise="none"), model, 0.5, progress=False)
    assert plan.decision("0").mask.tolist() == (wanted >= wanted.sort().values[3]).tolist()
    assert model[0].out_channels == model[2].in_channels == 3
    assert model[5].in_features == 4 * 16, "a channel behind a flattening has several inputs"


@pytest.mark.parametrize("criterion", ["snip", "grasp", "crop"])
def test_criteria_of_gradients_are_those_of_autograd(criterion):
    model, x, y = network(), pictures(3), torch.tensor([0, 1, 2])
    weights = [model[i].weight for i in (0, 2, 5)]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True)
    flow = sum((g * g.detach()).sum() for g in gradients)
    turned = torch.autograd.grad(flow, weights)
    of = {"snip": [w * g for w, g in zip(weights, gradients)], "grasp": [w * t for w, t in zip(weights, turned)]}
    elements = [e.detach() for e in of.get(criterion, of["grasp"])]
    elements = elements if criterion == "grasp" else [e.abs() for e in elements]
    wanted = elements[0].flatten(1).sum(1) + elements[1].sum((0, 2, 3))
    seen = {}

    class Watched(SPA):
        def score(self, target, signals):
            seen[target.name] = super().score(target, signals)
            return seen[target.name]

    method = Watched(criterion=criterion, normalise="none", batch=3)
    prune(method, network(), 0.7, (x, y), objective="labels", progress=False)
    assert torch.allclose(seen["0"], wanted, atol=1e-6)
    one = Watched(criterion=criterion, normalise="none", aggregate="mean", batch=1)
    prune(one, network(), 0.7, (x, y), objective="labels", progress=False)
    if criterion != "snip":  # a sum of the gradients of all batches is three times their mean
        assert torch.allclose(seen["0"] * (27 + 72), wanted, atol=1e-6)
    else:
        assert torch.allclose(seen["0"] * (27 + 72) / 3, wanted, atol=1e-6)


def test_gradients_of_fused_attention_are_derived_twice():
    model = language_model()
    method = SPA(criterion="crop", structures=("channels", "heads"))
    plan = prune(method, model, 0.6, token_ids(2), progress=False)
    assert {t.unit for t, _ in plan.decisions()} == {"channels", "heads"} and plan.report.removed > 0
    assert bool(torch.isfinite(model(token_ids(1)).logits).all())


def test_what_is_left_of_a_layer_makes_up_for_what_left():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=draws) @ torch.randn(3, 6, generator=draws) + 0.1 * torch.randn(
        200, 6, generator=draws
    )
    weight, kept = torch.randn(4, 6, generator=draws), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    found = made_up_for(weight, 2 * x.T @ x, kept, 0.0)
    wanted = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(found[:, kept], wanted, atol=1e-4) and not bool(found[:, ~kept].any())
    costs = obs_elements(weight, 2 * x.T @ x, 0.0)
    alone = torch.ones(6, dtype=torch.bool).index_fill(0, torch.tensor([2]), False)
    solved = made_up_for(weight, 2 * x.T @ x, alone, 0.0)
    lost = (x @ (weight - solved).T).square().sum(0)
    assert torch.allclose(2 * lost, costs[:, 2], rtol=1e-2), "what removing one column costs at best"


@pytest.mark.parametrize("family", ["vgg", "resnet", "efficientnet"])
def test_obspa_keeps_more_of_the_answer_than_removal_alone(family, tmp_path):
    dense = answer(WEIGHT_FAMILIES[family](), family)
    apart = {}
    for name, method in (("obs", SPA(criterion="obs")), ("plain", Plain(criterion="obs"))):
        model = WEIGHT_FAMILIES[family]()
        plan = prune(method, model, 0.7, images(family, 3), progress=False)
        apart[name] = float((answer(model, family) - dense).square().mean())
        if name == "obs":
            plan.save(tmp_path)
            again = WEIGHT_FAMILIES[family]()
            WeightPlan.load(tmp_path).apply(again)
            assert torch.allclose(answer(again, family), answer(model, family), atol=1e-6)
    assert apart["obs"] < apart["plain"]


class Plain(SPA):
    """The same channels, and nothing solved."""

    def update(self, target, signals, mask):
        return {}


def test_no_data_is_needed_where_noise_does():
    model = network()
    plan = prune(SPA(criterion="obs", inputs="noise"), model, 0.7, pictures(), progress=False)
    other = prune(SPA(criterion="obs", inputs="noise"), network(), 0.7, pictures(seed=5), progress=False)
    assert plan.diff(other) == "the plans are equal", "of the samples the shape alone is read"
    with pytest.raises(PrunelabError, match="makes noise of images"):
        prune(SPA(criterion="obs", inputs="noise"), language_model(), 0.7, token_ids(), progress=False)


def test_channels_leave_in_rounds_before_and_after_training():
    model, tuned = network(), []
    prune(SPA(), model, 0.5, progress=False, rounds=3, tune=lambda net, number: tuned.append(number))
    assert tuned == [0, 1, 2] and model[0].out_channels < 6


def test_bad_input_is_one_line():
    with pytest.raises(PrunelabError, match="couples channels and heads, not layers"):
        SPA(structures=("layers",))
    with pytest.raises(PrunelabError, match="shares one budget out"):
        prune(SPA(), language_model(), "0.5,0.5,0.5", progress=False)
    reflect = nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")
    odd = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), reflect, nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(PrunelabError, match="pads with something else"):
        prune(SPA(criterion="obs"), odd, 0.5, pictures(2), progress=False)


@pytest.mark.parametrize("family", ["vgg", "resnet", "efficientnet"])
def test_groups_are_those_of_torch_pruning(family):
    tp = pytest.importorskip("torch_pruning")
    model = WEIGHT_FAMILIES[family]()
    graph = tp.DependencyGraph().build_dependency(model, images(family, 1))
    names = {id(module): name for name, module in model.named_modules()}
    adapter = weight_adapter(model)
    assert isinstance(adapter, ConvNet) and adapter.spaces
    for space in adapter.spaces.values():
        group = graph.get_pruning_group(space.made[0].module, tp.prune_conv_out_channels, idxs=[0]) if isinstance(
            space.made[0].module, nn.Conv2d
        ) else graph.get_pruning_group(space.made[0].module, tp.prune_linear_out_channels, idxs=[0])  # fmt: skip
        made, read = set(), set()
        for dependency, _ in group:
            module = dependency.target.module
            if isinstance(module, nn.Conv2d | nn.Linear):
                out = graph.is_out_channel_pruning_fn(dependency.handler) or getattr(module, "groups", 1) > 1
                (made if out else read).add(names[id(module)])
        assert made == {use.path for use in space.made if use.module.weight.dim() > 1}
        assert read == {use.path for use in space.read}


def test_a_budget_that_counts_takes_the_same_of_every_group():
    plan = prune(SPA(), network(), Budget(2, "removed"), progress=False)
    assert [int((~d.mask).sum()) for _, d in plan.decisions()] == [2, 2]
