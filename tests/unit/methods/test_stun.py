"""STUN: clusters against a set-by-set procedure, thresholds, representatives, and the sparsity of both stages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import load_pruned, prune, save_pruned
from prunelab.common.weights.adapters import weight_adapter
from prunelab.methods.stun.method import (
    CoActivation,
    Owl,
    Stun,
    cluster,
    cluster_means,
    coactivation_distance,
    representatives,
    router_distance,
    search_threshold,
)
from prunelab.methods.stun.outliers import block_ratios, outlier_share
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import language_model, token_ids

fast = settings(max_examples=60, deadline=None)


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- stage one -------------------------------------------------------------------------------------------------------


def by_sets(distance: Tensor, threshold: float, least: int) -> set[frozenset[int]]:
    """The published procedure on Python sets: every pair once, nearest first, with what was struck out on the way."""
    experts = range(len(distance))
    cluster_of = {i: frozenset({i}) for i in experts}
    open_pairs = {(i, j): float(distance[i, j]) for i in experts for j in experts if i != j}
    while len(set(cluster_of.values())) > least and open_pairs:
        (i, j), nearest = min(open_pairs.items(), key=lambda item: (item[1], item[0]))
        if nearest >= threshold:
            break
        ours, theirs = cluster_of[i], cluster_of[j]
        asked = [(a, j) for a in ours] + [(b, i) for b in theirs]
        if all(open_pairs.get(pair, float("inf")) < threshold for pair in asked):
            for pair in asked:
                del open_pairs[pair]
            for member in ours | theirs:
                cluster_of[member] = ours | theirs
        else:
            open_pairs.pop((i, j), None)
            open_pairs.pop((j, i), None)
    return set(cluster_of.values())


@fast
@given(st.integers(2, 14), st.integers(0, 1000), st.floats(0.2, 6), st.integers(1, 6))
def test_clusters_are_those_of_the_procedure_on_sets(experts, seed, threshold, least):
    distance = router_distance(points(experts, seed))
    labels = cluster(distance, threshold, min(least, experts))
    found = {frozenset((labels == label).nonzero().flatten().tolist()) for label in labels.unique()}
    assert found == by_sets(distance, threshold, min(least, experts))
    firsts = [int((labels == label).nonzero()[0]) for label in labels.unique()]
    assert firsts == sorted(firsts), "numbered by first member"


def test_extreme_thresholds_merge_nothing_or_down_to_the_least():
    distance = router_distance(points(10, 0))
    assert cluster(distance, float("-inf")).tolist() == list(range(10))
    assert int(cluster(distance, float("inf"), 4).max()) + 1 == 4


def test_a_chain_is_not_one_cluster():
    """Neighbours on a line lie close, its ends do not."""
    line = torch.arange(4.0).unsqueeze(1)
    assert cluster(router_distance(line), 1.5).tolist() == [0, 0, 1, 1]


def test_distances_of_all_kinds():
    router = points(5, 1)
    plain = router_distance(router)
    assert torch.allclose(plain[1, 3], (router[1] - router[3]).norm())
    assert torch.allclose(router_distance(router, by_norm=True), plain / router.norm())
    counts = torch.tensor([[0.0, 6.0, 1.0], [6.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
    used = coactivation_distance(counts)
    assert used[0, 1] == used.min() and torch.allclose(used.mean(), torch.tensor(-1.0))
    with pytest.raises(PrunelabError, match="chosen together"):
        coactivation_distance(torch.zeros(3, 3))


def test_coactivation_counts_pairs_of_first_choices():
    class Routed:
        logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

    class Seen:
        routing = Routed()

    class Of:
        units = 6

    counter = CoActivation(Of())
    counter.update(Seen())
    want = torch.zeros(6, 6)
    for row in Routed.logits:
        a, b = row.topk(2).indices.tolist()
        want[a, b] += 1
        want[b, a] += 1
    assert torch.equal(counter.value(), want)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 500), st.integers(1, 3), st.data())
def test_the_search_meets_the_number_or_the_nearest_larger(seed, layers, data):
    distances = [router_distance(points(8, seed + i)) for i in range(layers)]
    wanted = data.draw(st.integers(2 * layers, 8 * layers))

    def count(threshold: float) -> int:
        return sum(int(cluster(d, threshold, 2).max()) + 1 for d in distances)

    found = count(search_threshold(count, wanted))
    assert found >= wanted
    thresholds = torch.cat([d.flatten() for d in distances]).unique().tolist()
    counts = [count(t + 1e-6) for t in (-1.0, *thresholds)]
    if counts == sorted(counts, reverse=True):  # a union refused at one threshold may be made at another
        assert found == min(n for n in counts if n >= wanted)


def test_the_search_goes_below_zero_and_takes_jumps():
    assert search_threshold(lambda t: 10 if t < -37.3 else 4, 10) < -37.3
    assert search_threshold(lambda t: 10 if t < 2.2 else 4, 7) < 2.2, "10 is the nearest number that is not too few"
    with pytest.raises(PrunelabError, match="no threshold"):
        search_threshold(lambda t: 3, 5)


def test_representatives_lie_nearest_to_the_mean():
    w1, w2 = torch.tensor([0.0, 1.0, 5.0, 2.0]).view(4, 1, 1), torch.zeros(4, 2, 2)
    labels = torch.tensor([0, 0, 1, 0])
    assert representatives([w1, w2], labels).tolist() == [1, 2]
    assert cluster_means(w1, labels).flatten().tolist() == [1.0, 5.0]


def test_twins_are_united_and_their_means_take_their_place():
    model, dense = language_model("mixtral"), language_model("mixtral")
    with torch.no_grad():
        for m in (model, dense):
            for target in weight_adapter(m).targets("experts"):
                router = weight_adapter(m).weights(target)["router"]
                router[3], router[2] = router[0] + 1e-3, router[1] + 1e-3
    plan = prune(Stun(then="none"), model, 0.5, token_ids(), progress=False)
    for target, decision in plan.decisions():
        parts = weight_adapter(dense).weights(target)
        assert decision.mask.tolist() == [True, True, False, False]
        for role in ("gate_up", "down", "router"):
            means = torch.stack([parts[role][[0, 3]].mean(0), parts[role][[1, 2]].mean(0)])
            assert torch.allclose(weight_adapter(model).weights(target)[role], means, atol=1e-6), role
    plan = prune(Stun(then="none", means_up_to=0), language_model("mixtral"), 0.5, token_ids(), progress=False)
    assert all(not decision.values for _, decision in plan.decisions()), "representatives keep their weights"


@pytest.mark.parametrize("similarity", ["router", "coactivation", "both"])
def test_layers_share_one_number_of_experts(similarity):
    model = language_model("olmoe", num_experts=8)
    plan = prune(Stun(then="none", similarity=similarity), model, 0.625, token_ids(), progress=False)
    kept = [decision.kept for _, decision in plan.decisions()]
    assert sum(kept) == 15 and min(kept) >= 2
    assert model(token_ids()).logits.isfinite().all()


# -- stage two -------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_pruning_twice():
    """One run of both stages equals stage one and then Wanda on the model it left."""
    once, twice = language_model("mixtral"), language_model("mixtral")
    plan = prune(Stun(then="wanda"), once, 0.5, token_ids(), progress=False)
    first = prune(Stun(then="none"), twice, 10 / 12, token_ids(), progress=False)
    gone = plan.report.prunable * 0.5 - first.report.removed
    left = sum(target.units for target in weight_adapter(twice).targets("linear"))
    prune(Wanda(), twice, 1 - gone / left, token_ids(), progress=False)
    assert same(once, twice)


@pytest.mark.parametrize("then", ["wanda", "owl"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_sparsity_counts_both_stages(then, family, tmp_path):
    model, dense = language_model(family), language_model(family)
    plan = prune(Stun(experts=0.75, then=then), model, 0.5, token_ids(), progress=False)
    report, adapter = plan.report, weight_adapter(dense)
    experts = adapter.targets("experts")
    loose = [target for target in adapter.targets("linear") if target.expert < 0]
    assert report.prunable == sum(t.parameters for t in experts) + sum(t.parameters for t in loose)
    assert report.removed == len(experts) * experts[0].size, "a quarter of four in every layer, wherever they were"
    rows = 1 / 24  # rows lose whole weights only
    assert 0.5 - rows < report.sparsity <= 0.5
    zeros = sum(
        int((weight_adapter(model).weights(t)["weight"] == 0).sum()) for t in plan.targets if t.unit == "linear"
    )
    assert zeros == report.zeroed
    save_pruned(model, plan, tmp_path)
    assert torch.equal(load_pruned(tmp_path)(token_ids()).logits, model(token_ids()).logits)


def test_experts_stay_where_the_budget_does_not_need_them_to_go():
    plan = prune(Stun(experts=0.5), language_model("mixtral"), 0.9, token_ids(), progress=False)
    assert 0.08 < plan.report.sparsity <= 0.1
    kept = sum(decision.kept for target, decision in plan.decisions() if target.unit == "experts")
    assert kept == 11


def test_blocks_with_outliers_keep_more():
    shares, sizes = torch.tensor([0.01, 0.03, 0.02]), torch.tensor([100, 100, 200])
    ratios = block_ratios(shares, sizes, 0.4, 0.08)
    assert ratios.argsort().tolist() == [0, 2, 1]
    assert torch.allclose(ratios.max() - ratios.min(), torch.tensor(0.16, dtype=torch.float64))
    assert torch.allclose((ratios * sizes).sum() / sizes.sum(), torch.tensor(0.4, dtype=torch.float64))
    assert torch.equal(block_ratios(torch.ones(3), sizes, 0.4, 0.08), torch.full((3,), 0.4, dtype=torch.float64))


@fast
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 0.5))
def test_ratios_stay_in_bounds_and_meet_the_mean(shares, keep, spread):
    sizes = torch.arange(1, len(shares) + 1)
    ratios = block_ratios(torch.tensor(shares), sizes, keep, spread)
    assert float((ratios * sizes).sum() / sizes.sum()) == pytest.approx(keep, abs=1e-9)
    assert float(ratios.min()) >= keep / 2 - 1e-9 and float(ratios.max()) <= 1 + 1e-9


def test_outliers_are_counted_over_the_block():
    scores = [torch.ones(3, 3), torch.full((1, 1), 31.0)]  # mean 4
    assert outlier_share(scores, 5.0) == pytest.approx(0.1)
    assert outlier_share(scores, 8.0) == 0


def test_owl_gives_more_to_a_block_of_outliers():
    model = language_model()
    with torch.no_grad():
        for linear in model.model.layers[1].mlp.children():
            if hasattr(linear, "weight"):
                linear.weight[::9, ::7] *= 40
    plan = prune(Owl(), model, 0.5, token_ids(), progress=False)
    shares: dict[int, list[int]] = {}
    for target, decision in plan.decisions():
        counts = shares.setdefault(target.block, [0, 0])
        counts[0] += decision.kept
        counts[1] += target.units
    ratios = {block: kept / units for block, (kept, units) in shares.items()}
    assert max(ratios, key=ratios.__getitem__) == 1 and max(ratios.values()) - min(ratios.values()) > 0.1
    assert 0.45 < plan.report.sparsity <= 0.5


def test_bad_input_says_what_to_do():
    model = language_model("mixtral")
    for wrong in ({"experts": 0.0}, {"experts": 1.5}, {"means_up_to": -1}, {"outlier": 0.0}, {"spread": -1.0}):
        with pytest.raises(PrunelabError, match="stun"):
            Stun(**wrong)
    with pytest.raises(PrunelabError, match=r"one ratio|for single weights"):
        prune(Stun(), model, "2:4", token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="one ratio"):
        prune(Owl(), language_model(), Budget(7, "count"), token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="fewer than the 6 that tokens are sent to"):
        prune(Stun(then="none"), model, 0.25, token_ids(), progress=False)
    with pytest.raises(PrunelabError, match="prunes experts"):
        prune(Stun(), language_model(), 0.5, token_ids(), progress=False)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] = float("inf")
    with pytest.raises(PrunelabError, match=r"router of .*layers.1"):
        prune(Stun(), model, 0.5, token_ids(), progress=False)
