"""DivPrune: the greedy rule against the search it stands for, batches, padding, and its tables."""

from __future__ import annotations

import csv

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.divprune import measure, straightforward
from prunelab.common.core.budget import Budget
from prunelab.common.core.selection import cosine_distance, max_min_order
from prunelab.common.experiments import papers
from prunelab.methods.divprune.method import DISTANCES, DivPrune, turned_round
from prunelab.methods.divprune.tables import costs
from tests.contract.references import signals


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(2, 40), share=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_running_minimum_picks_what_the_search_picks(tokens, share, seed):
    x = torch.randn(3, tokens, 8, generator=torch.Generator().manual_seed(seed))
    distance, count = cosine_distance(x), max(1, int(share * tokens))
    assert torch.equal(max_min_order(distance, count), torch.stack([straightforward(d, count) for d in distance]))


def test_turned_round_every_pick_is_near_to_all_before():
    distance = cosine_distance(torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(0)))
    (order,) = max_min_order(turned_round(distance), 30).tolist()
    others = distance[0].fill_diagonal_(0.0)
    assert order[0] == int(others.amax(1).argmin()), "first the one whose farthest is nearest"
    for k in range(1, 30):
        left = [i for i in range(30) if i not in order[:k]]
        assert others[order[k], order[:k]].max() == min(others[i, order[:k]].max() for i in left)


def test_every_pick_is_the_farthest_from_those_before():
    distance = cosine_distance(torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(0)))[0]
    order = max_min_order(distance.unsqueeze(0), 30)[0].tolist()
    assert sorted(order) == list(range(30)), "none twice"
    for step in range(1, 30):
        left = order[step:]
        nearest = {j: float(distance[order[:step], j].min()) for j in left}
        assert nearest[order[step]] == pytest.approx(max(nearest.values()))


def test_copies_are_not_picked_twice_and_a_lone_token_is_picked():
    x = torch.randn(1, 1, 5).expand(1, 6, 5)
    assert sorted(max_min_order(cosine_distance(x), 6)[0].tolist()) == list(range(6))
    assert max_min_order(cosine_distance(x[:, :1]), 1).tolist() == [[0]]
    assert max_min_order(cosine_distance(x), 0).shape == (1, 0)


def test_zero_tokens_are_at_distance_one():
    distance = cosine_distance(torch.tensor([[[0.0, 0.0], [1.0, 2.0]]]))
    assert distance[0, 0, 1] == 1


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_distances_choose_alike_alone_and_in_a_padded_batch(distance):
    method = DivPrune(distance=distance)
    bare, padded = signals(patches=15, seed=4)[0], signals(patches=15, seed=4, pad=6)[0]
    site = method.sites(bare.info)[0]
    want = method.plan(site, bare, Budget(5, "count")).reduce
    got = method.plan(site, padded, Budget(5, "count")).reduce
    assert torch.equal(want.index, got.index)


def test_flops_columns_give_every_printed_digit():
    found = costs()
    with (papers.METHODS / "divprune" / "reported.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["column"].startswith("FLOPs")]
    checked = 0
    for row in rows:
        value = found.get(f"{row['table']}/{row['row']}/{row['column']}")
        if value is not None:
            assert value["value"] == pytest.approx(float(row["value"]), abs=0.0006 if row["unit"] == "T" else 0.01), row
            checked += 1
    assert checked == 30


def test_the_running_minimum_is_an_order_of_magnitude_faster():
    """At the size of a large image, on one thread; a bound far from what `benchmarks.divprune` measures alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert measure(2880, 288, 16, 1, 3)["picks"] > 8
    finally:
        torch.set_num_threads(threads)
