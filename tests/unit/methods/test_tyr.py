"""Týr: exact solutions, totals that stay, candidates within bounds, and bad input."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn import functional as F

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.surgery import split, surgery
from prunelab.common.weights.targets import Decision, Target
from prunelab.methods.tyr.method import Inverse, Tyr, divergence, grams, remaining
from tests.contract.references import language_model, token_ids

SHORT = {"iterations": 2, "generations": 3, "offspring": 5, "tokens": (12, 36), "survivors": (3, 1), "least_neurons": 2}


def layer(size: int = 1, outputs: int = 6, inputs: int = 12):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    return torch.randn(outputs, inputs, generator=g), x.T @ x, x


@pytest.mark.parametrize("size", [1, 3])
def test_what_stays_is_the_least_squares_solution(size):
    weight, hessian, x = layer()
    kept, pruned = surgery(weight, hessian, size, 12 // size // 2, 4, damping=1e-9)
    columns = kept.repeat_interleave(size)
    wanted = torch.linalg.lstsq(x[:, columns].double(), (x @ weight.T).double()).solution.T
    assert torch.allclose(pruned[:, columns].double(), wanted, rtol=1e-2, atol=1e-3)
    assert bool((pruned[:, ~columns] == 0).all()) and int(kept.sum()) == 12 // size // 2


def test_one_at_a_time_finds_the_cheapest_group_and_inputs_never_used_leave_first():
    weight, hessian, x = layer()
    costs = []
    for gone in range(12):
        left = [i for i in range(12) if i != gone]
        solution = torch.linalg.lstsq(x[:, left].double(), (x @ weight.T).double())
        costs.append(float((x[:, left].double() @ solution.solution - (x @ weight.T).double()).square().sum()))
    kept, _ = surgery(weight, hessian, 1, 11, 1, damping=1e-9, gradient=False)
    assert int((~kept).nonzero()) == min(range(12), key=costs.__getitem__)
    x[:, 4] = 0
    kept, pruned = surgery(weight, x.T @ x, 1, 10, 2)
    assert not kept[4] and bool((pruned[:, 4] == 0).all())
    whole, same = surgery(weight, hessian, 1, 12, 16)
    assert bool(whole.all()) and torch.equal(same, weight)
    none, empty = surgery(weight, hessian, 3, 0, 1)
    assert not bool(none.any()) and bool((empty == 0).all())


def test_nothing_of_a_layer_stays_behind_it():
    model = language_model()
    adapter = weight_adapter(model)
    target = adapter.targets("attention_output")[0]
    factories = grams(0.01)
    gram, inverse = factories["gram"](target), factories["inverse"](target)
    assert isinstance(inverse, Inverse) and inverse.of is gram
    alive = weakref.ref(gram)
    del gram, inverse
    assert alive() is None, "the Gram matrix of a layer that was left"
    decision = Decision(
        torch.ones(target.units, dtype=torch.bool), {"o": torch.zeros_like(adapter.weights(target)["o"])}
    )
    tried = weakref.ref(decision.values["o"])
    undo = adapter.attempt(target, decision)
    del decision
    assert tried() is None, "the weight of a candidate that the model has by now"
    undo()


def test_groups_are_split_evenly_and_counted_without_float_error():
    assert split(10, 4) == [3, 3, 2, 2] and split(2, 16) == [1, 1]
    assert remaining(10, 0.7) == 3 and remaining(32, 0.03) == 31


def test_divergence_is_that_of_whole_distributions():
    a, b = torch.randn(4, 9), torch.randn(4, 9)
    wanted = F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="sum") / 4
    assert float(divergence(a, b)) == pytest.approx(float(wanted), rel=1e-5) and float(divergence(a, a)) == 0


def test_levels_stay_within_a_layer_and_halve():
    heads, neurons = Target("attention_output", "a", 0, "a", (32,)), Target("channels", "m", 0, "m", (11008,))
    method = Tyr()
    assert method.levels_of(heads, 16, 0) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert method.levels_of(neurons, 5504, 0)[:2] == [0, 1376]
    assert [method.step_of(neurons, i) for i in range(4)] == [1376, 688, 344, 172]
    assert [method.step_of(heads, i) for i in range(4)] == [4, 2, 1, 1]


@pytest.mark.parametrize("family", ["llama", "llama_mha"])
def test_totals_of_each_kind_stay_and_layers_differ(family):
    model = language_model(family)
    plan = prune(Tyr(**SHORT), model, 0.5, token_ids(), progress=False)
    for unit, total in (("attention_output", 6), ("channels", 60)):
        assert sum(d.kept for t, d in plan.decisions() if t.unit == unit) == total
    silenced = [(model.model.layers[i].self_attn.o_proj.weight == 0).all(0).sum() for i in range(3)]
    assert int(sum(silenced)) == 6 * 8, "heads are zeros, and stay where they are"


def test_a_search_beats_equal_shares_on_what_it_looks_at():
    searched, equal = language_model(), language_model()
    options = {**SHORT, "generations": 6, "tokens": (48,), "survivors": (1,)}
    prune(Tyr(**options), searched, 0.5, token_ids(), progress=False)
    prune(Tyr(**{**options, "generations": 0}), equal, 0.5, token_ids(), progress=False)
    with torch.no_grad():
        dense, ids = language_model()(token_ids()).logits, token_ids()
        left = [model(ids).logits[:, :-1].flatten(0, 1) for model in (searched, equal)]
    gaps = [float(divergence(dense[:, :-1].flatten(0, 1), logits)) for logits in left]
    assert gaps[0] < gaps[1]


def test_query_heads_cannot_leave():
    model = language_model()
    adapter = weight_adapter(model)
    target = adapter.targets("attention_output")[0]
    assert target.units == 4 and target.span == 8
    with pytest.raises(PrunelabError, match="silenced"):
        adapter.check(target, Decision(torch.tensor([True, False, True, True])))
    adapter.write(target, Decision(torch.tensor([True, False, True, True]), remove=False))
    assert bool((model.model.layers[0].self_attn.o_proj.weight[:, 8:16] == 0).all())


def test_bad_input_is_named():
    with pytest.raises(PrunelabError, match="one a stage"):
        Tyr(tokens=(10,))
    with pytest.raises(PrunelabError, match="tyr: iterations"):
        Tyr(iterations=0)


def test_what_is_zero_already_leaves_first_and_the_others_see_the_inverse_without_it():
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(60, 8, generator=g), torch.randn(5, 8, generator=g)
    x[:, 1:] += 0.5 * x[:, :-1]
    x[:, 7], weight[:, 2] = 0, 0  # an input that nobody uses, and one that is used but counts for nothing
    hessian = x.T @ x
    everything, same = surgery(weight, hessian, 1, 8, 4)
    assert bool(everything.all())
    assert torch.equal(same[:, :7], weight[:, :7])
    assert not same[:, 7].any()
    kept, released = surgery(weight, hessian, 1, 6, 4)
    assert kept.tolist() == [True, True, False, True, True, True, True, False]
    full = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(8)
    inverse, alive = torch.linalg.inv(full), kept.float()
    target = full @ torch.where(alive.bool().unsqueeze(1), weight.T, 0)
    wanted = (inverse * alive * alive.unsqueeze(1)) @ target
    assert torch.allclose(released, wanted.T, atol=1e-4)
    again = surgery(weight, hessian, 1, 3, 2, inverse=inverse)
    assert all(
        torch.allclose(a.float(), b.float(), atol=1e-4)
        for a, b in zip(again, surgery(weight, hessian, 1, 3, 2), strict=True)
    )
