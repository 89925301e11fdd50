"""OSSCAR against brute force: costs, gains, and what the search may do."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from prunelab.common.weights.surgery import damped, surgery
from prunelab.methods.osscar.method import gains, loss, searched, solved


def layer(groups: int, size: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups * size, groups * size, generator=g, dtype=torch.float64)
    x = torch.randn(60, groups * size, generator=g, dtype=torch.float64) @ mix
    hessian = damped(x.T @ x, 0.01)
    weight = torch.randn(groups * size, 4, generator=g, dtype=torch.float64)
    return hessian, hessian @ weight, weight


@pytest.mark.parametrize("size", [1, 3])
def test_a_gain_is_by_how_much_the_loss_falls(size):
    hessian, target, _ = layer(6, size)
    stay = torch.tensor([True, False, True, True, False, False])
    now = loss(solved(hessian, target, stay.repeat_interleave(size)), hessian, target)
    found = gains(hessian, target, stay.repeat_interleave(size), size)
    for group in (1, 4, 5):
        more = stay.clone()
        more[group] = True
        then = loss(solved(hessian, target, more.repeat_interleave(size)), hessian, target)
        assert float(found[group]) == pytest.approx(float(now - then), rel=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_never_loses_and_stays_above_the_best(seed):
    hessian, target, weight = layer(9, 2, seed)
    stay, first = surgery(weight.T, hessian, 2, 4, 1, 0.0, gradient=False)
    kept, found = searched(first.T, hessian, target, stay, 2, 20, 2)
    before, after = loss(first.T, hessian, target), loss(found, hessian, target)
    among = [torch.isin(torch.arange(9), torch.tensor(c)).repeat_interleave(2) for c in combinations(range(9), 4)]
    best = min(float(loss(solved(hessian, target, kept_of), hessian, target)) for kept_of in among)
    assert int(kept.sum()) == 4
    assert best * (1 + 1e-9) <= float(after) + 1e-6
    assert float(after) <= float(before) + 1e-9 * abs(float(before))


def test_nothing_to_lose_keeps_the_weight():
    hessian, _, weight = layer(5, 1)
    stay, new = surgery(weight.T, hessian, 1, 5, 1, 0.01, gradient=False)
    assert bool(stay.all()) and torch.equal(new, weight.T)
