"""Pruning by explaining: what relevance keeps, what stops it, and the toy experiments' bands."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from prunelab.common import testbeds
from prunelab.common.backbones import cifar_resnet
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import points
from prunelab.common.weights import prune
from prunelab.common.weights.adapters.channel_graph import trace
from prunelab.common.weights.relevance import Rule, flowed_back
from prunelab.common.weights.rounds import Rounds
from prunelab.methods.pruning_by_explaining import tables
from prunelab.methods.pruning_by_explaining.method import PruningByExplaining, contribution, least, normalised
from tests.contract.families import WEIGHT_FAMILIES, images
from tests.contract.references import language_model, token_ids

LABELS = torch.tensor([1, 4, 6])


class Residual(nn.Module):
    """A sum, a concatenation, both kinds of pooling, and work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(16, 5)

    def forward(self, x):
        x = self.act(self.first(x))
        x = F.max_pool2d(x + self.act(self.second(x)), 2)
        return self.head(torch.cat([x, x], 1).mean((2, 3)).flatten(1))


def test_relevance_is_conserved_from_layer_to_layer():
    torch.manual_seed(0)
    model, x, labels = Residual().eval(), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for start in ("one", "logit"):
        found = flowed_back(model, trace(model), x, labels, Rule(), start=start)
        whole = 4.0 if start == "one" else float(model(x).detach().gather(1, labels[:, None]).sum())
        assert float(found["head"][1].sum()) == pytest.approx(whole, rel=1e-5)
        both = found["first"][1].sum() + 0  # the second layer's share comes back through it
        assert float(both) == pytest.approx(whole, rel=1e-3)


def test_relevance_passes_shortcuts_that_pad_channels():
    torch.manual_seed(0)
    model, x = cifar_resnet.resnet20().eval(), torch.randn(4, 3, 32, 32)
    found = flowed_back(model, fx.Tracer().trace(model), x, torch.arange(4), Rule("z+"))
    total = found["conv1"][1].flatten(1).sum(1)
    assert torch.allclose(total, torch.ones(4), atol=1e-4), "all of it arrives, whichever way it took"


def test_without_a_rule_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    model, x, labels = Residual().eval(), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    kept: list[torch.Tensor] = []
    plain = copy.deepcopy(model)
    plain.act = nn.ReLU()
    handle = plain.second.register_forward_hook(lambda m, a, out: kept.append(out) or out.retain_grad())
    F.cross_entropy(plain(x), labels).backward()
    handle.remove()
    outputs, back = flowed_back(model, trace(model), x, labels)["second"]
    assert torch.allclose(back, kept[0].grad, atol=1e-7)
    assert float(outputs.min()) < 0, "outputs are those in front of the ReLU, which works in place"


def test_rules_agree_where_weights_and_inputs_are_positive():
    x, weight, relevance = torch.rand(2, 6) + 0.1, torch.rand(4, 6) + 0.1, torch.rand(2, 4)
    plus = Rule()(F.linear, x, weight, relevance)
    assert torch.allclose(plus, Rule("simple")(F.linear, x, weight, relevance))
    assert torch.allclose(plus, Rule("alphabeta", 1.0)(F.linear, x, weight, relevance))
    assert torch.allclose(plus, Rule("zB", low=0.0, high=0.0)(F.linear, x, weight, relevance))
    assert float(plus.sum()) == pytest.approx(float(relevance.sum()), rel=1e-5)


def test_scores_are_relative_to_their_layer():
    raw = torch.tensor([1.0, -2.0, 4.0])
    assert torch.allclose(normalised("lrp", raw), raw / 3) and torch.allclose(normalised("lrp", raw, False), raw / 3)
    assert torch.allclose(normalised("taylor", raw), raw.abs() / raw.norm())
    assert torch.equal(normalised("gradient", raw, False), raw.abs())
    assert torch.equal(normalised("weight", raw, False), raw)
    assert torch.equal(normalised("taylor", torch.zeros(3)), torch.zeros(3)), "no division by zero"
    back = torch.tensor([[[1.0, -3.0]]])
    assert float(contribution("lrp", back, back)) == -2 and float(contribution("lrp", back, back, True)) == 4
    assert least([torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5])], 3) == [(0, 0), (1, 0), (1, 1)]


def test_budgets_are_of_all_layers_and_each_keeps_its_best():
    for criterion in ("lrp", "taylor", "gradient", "weight"):
        plan = prune(
            PruningByExplaining(criterion), WEIGHT_FAMILIES["vgg"](), 0.25, (images("vgg"), LABELS), progress=False
        )
        kept = [decision.kept for _, decision in plan.decisions()]
        assert sum(kept) == 10 and min(kept) >= 1, (criterion, kept)
    spared = PruningByExplaining(spare=("9",))
    plan = prune(spared, WEIGHT_FAMILIES["vgg"](), 0.5, (images("vgg"), LABELS), progress=False)
    assert [target.name for target, _ in plan.decisions()] == ["0", "4"]


def test_rounds_take_steps_of_the_unpruned_network():
    amounts = [b.amounts[0] for b in Rounds(step=0.05).budgets(Budget(0.72))]
    assert amounts == pytest.approx([0.95, 0.9, 0.85, 0.8, 0.75, 0.72])
    assert [b.amounts[0] for b in Rounds(step=0.05).budgets(Budget(0.9))] == pytest.approx([0.95, 0.9])
    assert Rounds(step=0.5).budgets(Budget(1.0)) == [Budget(1.0)]
    with pytest.raises(PrunelabError, match="fixed step"):
        Rounds(step=0.05).budgets(Budget(3, "removed"))
    tuned = []
    prune(PruningByExplaining(step=0.1), WEIGHT_FAMILIES["vgg"](), 0.75, (images("vgg"), LABELS), progress=False,
          tune=lambda model, number: tuned.append(number))  # fmt: skip
    assert tuned == [0, 1, 2]


def test_bad_input_is_named():
    for wrong in ({"step": 0.0}, {"step": 1.5}, {"batch": 0}):
        with pytest.raises(PrunelabError, match="pruning_by_explaining"):
            PruningByExplaining(**wrong)
    with pytest.raises(PrunelabError, match="pairs of inputs and labels"):
        prune(PruningByExplaining(), WEIGHT_FAMILIES["vgg"](), 0.5, images("vgg"), progress=False)
    with pytest.raises(PrunelabError, match="cannot be traced"):
        prune(PruningByExplaining(), language_model(), 0.5, token_ids(), progress=False)
    small = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(PrunelabError, match="2 numbers"):
        prune(PruningByExplaining(), small, 0.5, [(torch.rand(3), torch.tensor(1))], progress=False)
    with pytest.raises(PrunelabError, match="2 amounts for 1 blocks"):
        prune(PruningByExplaining(), small, (0.5, 0.5), [(torch.rand(2), torch.tensor(1))], progress=False)


def test_points_are_the_papers():
    x, y = points.drawn("mult", 125, 4)
    assert x.shape == (500, 2) and y.bincount().tolist() == [125] * 4
    draws = np.random.RandomState(4)
    angle = 4.0 * 0 + 4.0 * 1 + 0.2 * draws.standard_normal(125)[-1]
    assert x[124].tolist() == pytest.approx([np.sin(angle), np.cos(angle)], abs=1e-6)
    assert points.drawn("mult", 1, 0)[0].abs().max() == 0, "one point an arm lies in the middle"
    assert not torch.equal(points.drawn("moon", 5, 0)[0], points.drawn("moon", 5, 0, blur=0.3)[0])
    with pytest.raises(PrunelabError, match="circle, moon, mult"):
        points.drawn("square", 5, 0)  # type: ignore[arg-type]


def test_networks_are_what_their_logs_say_and_the_bands_hold():
    model, log = testbeds.load("points_circle")
    assert tables.accuracy(model, points.training("circle")) / 100 == pytest.approx(log["test"]["accuracy"], abs=1e-3)
    reference = points.drawn("circle", 10, 0)
    left, trained = tables.pruned(model, "lrp", reference), points.training("circle")
    assert sum(m.out_features for m in left if isinstance(m, nn.Linear)) - 2 == 2000
    assert tables.accuracy(left, trained) > 99.7
    assert 96 < tables.accuracy(tables.pruned(model, "weight", reference), trained) < 99
    assert 67 < tables.accuracy(tables.pruned(model, "lrp", points.drawn("circle", 1, 0)), trained) < 72
