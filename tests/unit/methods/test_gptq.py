"""GPTQ and RTN beyond the golden cases: a plain reference for every order and grid, turns, experts without tokens."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import WeightPlan, prune
from prunelab.common.weights.adapters import weight_adapter
from prunelab.common.weights.obs import dead, falling, inverse_factor
from prunelab.common.weights.quantisation import Quantiser, gptq, proxy_loss, rounded
from prunelab.methods.gptq.method import Gptq, Rtn
from tests.contract.references import language_model, token_ids


def plain(w, hessian, q: Quantiser, width, ordered, static, updated):
    """The algorithm in float64, one column at a time."""
    w, columns = w.double().clone(), w.shape[1]
    order = falling(hessian.diagonal()) if ordered else torch.arange(columns)
    u = inverse_factor(hessian.double()[order][:, order], 0.01)
    original, w = w.clone(), w[:, order]
    held, group = w.clone(), q.width(columns)  # what grids on the way see: updated behind each block
    grids = {g: q.grid(original[:, g * group : (g + 1) * group]) for g in range(-(-columns // group))}
    out = torch.zeros_like(w)
    for i in range(columns):
        if i % width == 0:
            held[:, i:] = w[:, i:]
        if q.group and not static and i % group == 0:
            grids[i // group] = q.grid((w if updated else held)[:, i : i + group])
        scale, zero = grids[int(order[i]) // group if static or not q.group else i // group]
        out[:, i] = (scale * (q.codes(w[:, i : i + 1], scale, zero) - zero))[:, 0]
        w[:, i:] -= ((w[:, i] - out[:, i]) / u[i, i])[:, None] * u[i, i:]
    return out[:, order.argsort()]


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("static", "updated"), [(False, False), (True, False), (False, True)])
def test_every_order_and_grid_is_the_plain_algorithm(width, group, ordered, static, updated):
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(12, 48, generator=g), torch.randn(300, 48, generator=g) @ torch.randn(48, 48, generator=g)
    hessian, q = x.T @ x / 300, Quantiser(3, group=group)
    order = falling(hessian.diagonal()) if ordered else torch.arange(48)
    factor = inverse_factor(hessian[order][:, order], 0.01)
    code = gptq(w, factor, q, width, order if ordered else None, static=static, updated=updated)
    want = plain(w, hessian, q, width, ordered, static, updated)
    assert float(((code.dense() - want).abs() > 1e-3).float().mean()) < 0.02  # a tie may fall either way
    assert (code.index is not None) == (ordered and bool(group) and not static)
    nearest = rounded(w, q)
    here = proxy_loss(w[:, order], code.dense()[:, order], factor)
    assert here < 0.7 * proxy_loss(w[:, order], nearest.dense()[:, order], factor)


def test_channels_without_input_become_zero_and_layers_without_any_do_not():
    diagonal = torch.tensor([2.0, 0, 1])
    assert dead(diagonal).tolist() == [False, True, False] and falling(diagonal).tolist() == [0, 1, 2]
    assert not bool(dead(torch.zeros(3)).any())
    code = gptq(torch.ones(1, 3), torch.eye(3), Quantiser(2), dead=dead(diagonal))
    assert code.dense().tolist() == [[1, 0, 1]]


def test_experts_that_no_token_reaches_are_rounded_to_the_nearest():
    model = language_model("mixtral")
    with torch.no_grad():  # its router never chooses expert 2
        for block in model.model.layers:
            block.mlp.gate.weight[2] = -block.mlp.gate.weight[0] * 0
            block.mlp.gate.weight[:2] = 0
            block.mlp.gate.weight[3:] = 0
    ids = token_ids(2)
    adapter = weight_adapter(model)
    before = {t.name: adapter.weights(t)["weight"].clone() for t in adapter.targets("linear") if t.expert >= 0}
    plan = prune(Gptq(), model, "3bits", ids, progress=False)
    nearest = [
        target.expert
        for target, decision in plan.decisions()
        if target.expert >= 0 and torch.equal(decision.code.codes, rounded(before[target.name], Quantiser(3)).codes)
    ]
    assert set(nearest) and set(nearest) < {0, 1, 2, 3}


def test_in_turn_each_linear_reads_what_the_others_left():
    together, turns = (
        prune(Gptq(true_sequential=t), language_model(), "2bits", token_ids(), progress=False) for t in (False, True)
    )
    same = {
        t.role: torch.equal(together.decision(t).code.dense(), turns.decision(t).code.dense())
        for t in together.targets
        if t.block == 0
    }
    first = {role for role, alike in same.items() if alike}
    assert first == {f"self_attn.{part}_proj" for part in "qkv"}


def test_groups_out_of_order_come_back_from_disk(tmp_path):
    model = language_model()
    plan = prune(Gptq(group=8, act_order=True), model, "3bits", token_ids(), progress=False)
    assert any(d.code.index is not None for _, d in plan.decisions())
    plan.save(tmp_path)
    again = language_model()
    WeightPlan.load(tmp_path).apply(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    small = prune(Gptq(group=8), language_model(), "3bits", token_ids(), progress=False)
    assert plan.report.bytes - small.report.bytes == sum(4 * t.shape[1] for t in plan.targets)


def test_what_is_out_of_range_is_refused():
    for options in ({"group": -1}, {"steps": 0}, {"shrink": 1.5}, {"power": 0}):
        with pytest.raises(PrunelabError):
            Rtn(**options)
    for options in ({"damping": -1}, {"width": 0}, {"tries": 0}):
        with pytest.raises(PrunelabError, match="gptq"):
            Gptq(**options)
    with pytest.raises(PrunelabError, match="1 to 8 whole bits"):
        prune(Rtn(), language_model(), Budget(2.5, "bits"), progress=False)


def test_damping_is_added_again_until_it_suffices():
    hessian = torch.tensor([[1.0, 2.1], [2.1, 1]])
    with pytest.raises(PrunelabError, match="singular"):
        inverse_factor(hessian, 0.5)
    assert torch.allclose(inverse_factor(hessian, 0.5, 5), inverse_factor(hessian, 1.5))
