"""Budgets, reductions and the selection steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Mix
from prunelab.common.ranking import sentences

fast = settings(max_examples=30, deadline=None)


@pytest.mark.parametrize(
    ("text", "amounts", "unit"),
    [
        ("0.7", (0.7,), "ratio"),
        ("0.9, 0.8,0.7", (0.9, 0.8, 0.7), "ratio"),
        ("13removed", (13,), "removed"),
        ("665bytes", (665,), "bytes"),
        ("2.97e9macs", (2.97e9,), "macs"),
        ("0.75cost", (0.75,), "cost"),
    ],
)
def test_budget_reads_and_prints(text, amounts, unit):
    budget = Budget.parse(text)
    assert budget.amounts == amounts
    assert budget.unit == unit
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["", "x", "1.2", "-0.1", "-3count", "nan", "0.5apples", "1.5cost", "0.5,,0.2"])
def test_budget_refuses(text):
    with pytest.raises(PrunelabError):
        Budget.parse(text)


def test_ratio_survives_single_precision():
    assert Budget(float(torch.tensor(0.7))).count(10) == 7
    assert Budget(0.9).count(196) == 176
    assert Budget(1.0).count(7) == 7
    assert Budget(9, "removed").count(5) == 0


def test_budget_of_a_site():
    assert Budget((0.9, 0.8)).at(1) == Budget(0.8)
    assert Budget(0.5).at(7) == Budget(0.5)
    with pytest.raises(PrunelabError, match="more sites"):
        Budget((0.9, 0.8)).at(2)


@pytest.mark.parametrize("values", ["apart", "alike", "without bound"])
@pytest.mark.parametrize("shape", [(selection.MANY,), (5, 576), (2, 3, 1000)])
def test_the_best_of_many_are_those_of_a_whole_sort(values, shape):
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    if values == "alike":
        scores = scores.round()
    if values == "without bound":
        scores = torch.where(scores.abs() > 1, scores * float("inf"), torch.where(scores > 0, 0.0, -0.0))
    for k in (0, 1, 100, shape[-1], shape[-1] + 5):
        wanted = selection.descending(scores)[..., :k].sort(-1).values
        assert torch.equal(selection.top_k(scores, k)[0], wanted)


@fast
@given(n=st.integers(1, 12), k=st.integers(0, 12), seed=st.integers(0, 9))
def test_gather_is_its_matrix(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    index, _ = selection.top_k(torch.rand(2, n, generator=g), min(k, n))
    x = torch.randn(2, n, 3, generator=g)
    reduce = Gather(index)
    assert torch.equal(reduce.matrix(n) @ x, reduce.apply(x))


@fast
@given(n=st.integers(1, 8), k=st.integers(1, 10), seed=st.integers(0, 9))
def test_mix_is_its_matrix_also_when_it_grows(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    matrix, x = torch.randn(2, k, n, generator=g), torch.randn(2, n, 3, generator=g)
    mix = Mix.from_matrix(matrix)
    assert torch.allclose(mix.matrix(n), matrix)
    assert torch.allclose(mix.apply(x), matrix @ x, atol=1e-5)


def test_gather_works_per_head():
    x, index = torch.randn(2, 3, 7, 4), torch.tensor([[[0, 6], [1, 2], [3, 5]]]).expand(2, -1, -1)
    assert torch.equal(Gather(index).apply(x)[1, 2], x[1, 2, [3, 5]])


def test_top_k_breaks_ties_towards_the_front():
    assert selection.top_k(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), 3)[0].tolist() == [[0, 1, 3]]


@fast
@given(n=st.integers(2, 20), removed=st.integers(0, 20), seed=st.integers(0, 9), special=st.integers(0, 2))
def test_matching_conserves_mass(n, removed, seed, special):
    g = torch.Generator().manual_seed(seed)
    if n <= special:
        return
    metric, x = torch.randn(2, n, 4, generator=g), torch.randn(2, n, 3, generator=g)
    sizes = torch.randint(1, 5, (2, n), generator=g).float()
    matching = selection.bipartite_matching(metric, removed, class_token=special > 0, distill_token=special > 1)
    assert matching.outputs == n - min(removed, max(0, (n - special) // 2))
    total = matching.total(sizes)
    assert torch.equal(total.sum(1), sizes.sum(1))
    merged = matching.mix(sizes).apply(x)
    assert torch.allclose((merged * total[..., None]).sum(1), (x * sizes[..., None]).sum(1), atol=1e-4)
    assert bool((matching.slot[:, :special] == torch.arange(special)).all()), "prefix tokens keep their places"


@fast
@given(n=st.integers(1, 30), quantiles=st.integers(1, 60), seed=st.integers(0, 9))
def test_sampling_takes_the_heaviest_and_never_padding(n, quantiles, seed):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, n, generator=g) + 1e-3
    valid = torch.rand(3, n, generator=g) > 0.3
    valid[:, 0] = True
    kept = selection.inverse_transform_sampling(weights, quantiles, valid)
    assert not bool((kept & ~valid).any())
    assert bool((kept.sum(1) <= quantiles).all())
    if quantiles > 1:
        heaviest = weights.masked_fill(~valid, 0).argmax(1)
        assert bool(kept[torch.arange(3), heaviest].all()), "the last quantile falls on the largest weight"


def test_sampling_follows_the_weights():
    weights = torch.tensor([[0.9, 0.02, 0.02, 0.02, 0.02, 0.02]])
    assert int(selection.inverse_transform_sampling(weights, 4).sum()) < 4, "many quantiles share the heavy unit"
    even = torch.ones(1, 6)
    assert int(selection.inverse_transform_sampling(even, 6).sum()) >= 5


def test_keep_first_pads_to_the_longest():
    gather = selection.keep_first(torch.tensor([[2, 0, 1], [1, 2, 0]]), torch.tensor([1, 3]))
    assert gather.index.tolist() == [[2, 0, 0], [0, 1, 2]]
    assert gather.valid is not None
    assert gather.valid.tolist() == [[True, False, False], [True, True, True]]


def test_power_iteration_stops_on_tolerance():
    calls = []

    def halve(x):
        calls.append(1)
        return x / 2

    selection.power_iteration(halve, torch.ones(1), 100, tolerance=0.1)
    assert len(calls) == 4


def test_fill_respects_budgets_and_redundancy():
    sizes = [10, 10, 10, 10]
    assert sentences.fill([2, 0, 1, 3], sizes, Budget(20, "words")) == [2, 0]
    assert sentences.fill([2, 0, 1, 3], [1] * 4, Budget(2, "count"), lambda u, taken: u == 0) == [2, 1]
    assert sentences.fill([0], sizes, Budget(0, "count")) == []
    with pytest.raises(PrunelabError, match="text cannot be budgeted"):
        sentences.fill([0], sizes, Budget(0.5, "cost"))
