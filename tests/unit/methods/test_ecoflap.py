"""ECoFLaP: totals, bounds, what the coarse step leaves behind, and bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune
from prunelab.methods.ecoflap.method import ECoFLaP, shared_out, slope
from tests.contract.references import language_model, token_ids

OPTIONS = {"samples": 4, "batch": 2}


@settings(max_examples=80, deadline=None)
@given(scores=st.lists(st.floats(0, 1e3), min_size=2, max_size=9), keep=st.floats(0.2, 1.0), slack=st.floats(0.01, 0.5))
def test_shares_keep_at_least_the_budget_and_stay_within_bounds(scores, keep, slack):
    sizes = torch.tensor([100 + 37 * i for i in range(len(scores))])
    wanted = int(int(sizes.sum()) * keep)
    most = min(1.0, 1 - keep + slack)
    sparsity = shared_out(torch.tensor(scores), sizes, wanted, most)
    kept = ((1 - sparsity.double()) * sizes).round()
    assert float(sparsity.min()) >= 0 and float(sparsity.max()) <= most + 1e-6
    assert wanted <= int(kept.sum()) <= wanted + 2 * len(scores), "the excess of rounding up is taken twice"


def test_more_important_blocks_keep_more_and_none_of_importance_gets_the_rest():
    sizes = torch.tensor([1000, 1000, 1000])
    found = shared_out(torch.tensor([1.0, 2.0, 4.0]), sizes, 1500, 0.9)
    assert found[0] > found[1] > found[2]
    assert shared_out(torch.zeros(3), sizes, 3000, 0.9).tolist() == [0, 0, 0]
    assert shared_out(torch.tensor([1.0, 0.0, 0.0]), sizes, 1500, 1.0).tolist() == [0, 0.5, 1]


def test_the_slope_is_that_of_the_loss():
    weight, target = torch.zeros(3, 4, dtype=torch.float64), torch.arange(12.0, dtype=torch.float64).view(3, 4)
    found = slope(weight, lambda: (weight * target).sum(), 5, 1e-3)
    z = torch.normal(0.0, 1.0, (3, 4), generator=torch.Generator().manual_seed(5))
    assert found == pytest.approx(abs(float((z * target).sum())), rel=1e-6)
    assert float(weight.abs().max()) < 1e-15


@pytest.mark.parametrize("fine", ["wanda", "sparsegpt"])
def test_a_total_is_met_over_blocks_that_differ(fine):
    plan = prune(ECoFLaP(fine=fine, **OPTIONS), language_model(), 0.5, token_ids(), progress=False)
    blocks: dict[int, list[int]] = {}
    for target, decision in plan.decisions():
        blocks.setdefault(target.block, []).append(int(decision.mask.sum()))
    whole = sum(target.units for target, _ in plan.decisions())
    assert sum(map(sum, blocks.values())) / whole == pytest.approx(0.5, abs=0.03)
    assert len({sum(kept) for kept in blocks.values()}) > 1
    by_layer = prune(ECoFLaP(group="layer", mean=True, **OPTIONS), language_model(), 0.5, token_ids(), progress=False)
    shares = {round(float(d.mask.float().mean()), 3) for _, d in by_layer.decisions()}
    assert len(shares) > 3


@pytest.mark.parametrize("score", ["zeroth", "zeroth_magnitude", "zeroth_square", "gradient", "magnitude", "square"])
def test_every_score_leaves_the_weights_that_stay_to_the_bit(score):
    model, dense = language_model(), language_model()
    prune(ECoFLaP(score, **OPTIONS), model, 0.6, token_ids(), progress=False)
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        assert bool(((p == q) | (p == 0)).all())


def test_components_share_one_budget():
    torch.manual_seed(0)
    model = {"a": language_model(), "b": language_model(seed=2)}
    budget = Budget.by({"a": 0.5, "b": 0.5})
    plan = prune(
        ECoFLaP(**OPTIONS), model, budget, {"a": token_ids(), "b": token_ids(seed=4)}, progress=False,
        objective=lambda parts, batch: torch.stack([
            parts[name](input_ids=s[None], labels=s[None]).loss for name in parts for s in batch
        ]).mean(),
    )  # fmt: skip
    kept = {name: [d.mask.float().mean() for t, d in plan.decisions() if t.component == name] for name in model}
    shares = [float(torch.stack(found).mean()) for found in kept.values()]
    assert shares[0] != shares[1] and sum(shares) / 2 == pytest.approx(0.5, abs=0.03)


def test_bad_input_is_named():
    for wrong in ({"samples": 0}, {"batch": 0}, {"draws": 0}, {"epsilon": 0.0}):
        with pytest.raises(PrunelabError, match="ecoflap"):
            ECoFLaP(**wrong)
    for budget in ("2:4", (0.5, 0.5, 0.5)):
        with pytest.raises(PrunelabError, match="shares one ratio out"):
            prune(ECoFLaP(**OPTIONS), language_model(), budget, token_ids(), progress=False)


def test_groups_that_keep_enough_at_the_least_keep_no_more():
    sizes = torch.tensor([1001, 333, 57])
    least = (sizes * 0.4).ceil()
    found = shared_out(torch.tensor([0.2, 0.7, 0.1]), sizes, int(0.4 * int(sizes.sum())), 0.6)
    assert torch.allclose(found, 1 - least / sizes)
