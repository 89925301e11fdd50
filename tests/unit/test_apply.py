"""Applying: what is refused before work starts, and what the report says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from common import cost, registry
from common.apply import apply
from common.errors import PrunelabError
from common.types import Budget
from methods.ats.method import AdaptiveTokenSampling
from methods.cls_attention.method import ClassAttention
from methods.random_drop.method import RandomDrop
from methods.tome.method import ToMe
from methods.zero_tprune.method import ZeroTPrune
from tests.contract.references import NormTokens, images, vit


@pytest.mark.parametrize(
    ("method", "model", "budget", "message"),
    [
        (ZeroTPrune(), nn.Linear(2, 2), 0.5, "no adapter for .*supported"),
        (ZeroTPrune(layers=(99,)), None, 0.5, "prunes at layer 99"),
        (ZeroTPrune(), None, (0.9, 0.8), "more sites"),
        (ZeroTPrune(), None, (0.9, 0.8, 0.7, 0.6), "names 4 amounts"),
        (ClassAttention(), "average", 0.5, "no class token"),
    ],
)
def test_refusals_come_before_work(method, model, budget, message):
    model = vit(model or "plain") if not isinstance(model, nn.Module) else model
    with pytest.raises(PrunelabError, match=message), apply(method, model, Budget(budget)):
        pass


def test_a_method_is_not_applied_twice():
    model = vit()
    first = apply(ZeroTPrune(), model, 0.5)
    with first, pytest.raises(PrunelabError, match="already runs zero_tprune"), apply(ToMe(), model, 0.5):
        pass
    with apply(ToMe(), model, 0.5):
        pass


def test_report_counts_tokens_and_scoring():
    model = vit()
    with torch.no_grad(), apply(ZeroTPrune(), model, Budget(0.5)) as handle:
        before = handle.report()
        model(images())
        after = handle.report()
    assert before.tokens == after.tokens
    assert [a for a, _ in after.tokens] == [17, 17, 17, 9, 9, 9, 5, 5, 5]
    assert after.samples == 3
    assert after.scoring_macs > 0
    assert "saved" in str(after)


def test_dense_macs_match_a_count_by_hand():
    model = vit()
    n, d = 17, 24
    block = n * d * d * 12 + 2 * n * n * d
    hand = 16 * 3 * 64 * d + 9 * block + d * 7
    assert cost.macs(model, torch.empty(1, 3, 32, 32, device="meta")) == hand


def test_adaptive_method_is_costed_at_what_it_kept():
    model = vit()
    with apply(AdaptiveTokenSampling(), model, 0.5) as handle:
        with pytest.raises(PrunelabError, match="run the model first"):
            handle.report()
        with torch.no_grad():
            model(images())
        report = handle.report()
    assert report.tokens[4][1] < 17
    assert report.macs < report.dense_macs


def test_random_drop_draws_anew_but_repeats_with_the_seed():
    model, x = vit(), images()

    def places(seed):
        with torch.no_grad(), apply(RandomDrop(layers=(0,)), model, 0.5, seed=seed) as handle:
            model(x)
            return handle.kept()[0][1]

    assert torch.equal(places(0), places(0))
    assert not torch.equal(places(0), places(1))
    assert not torch.equal(places(0)[0], places(0)[1])


@pytest.mark.parametrize(("share", "method"), [(0.8, ZeroTPrune()), (0.7, ToMe()), (0.435, AdaptiveTokenSampling())])
def test_matched_budgets_meet_the_cost(share, method):
    model = vit(embed_dim=48, img_size=80)
    x = torch.randn(4, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    budget = cost.match(method, model, Budget(share, "cost"), x)
    with torch.no_grad(), apply(method, model, budget) as handle:
        model(x)
        report = handle.report()
    assert report.macs / report.dense_macs == pytest.approx(share, abs=0.03)


def test_a_cost_out_of_reach_gives_the_nearest_end():
    model = vit()
    method = ZeroTPrune(layers=(7, 8))
    with apply(method, model, cost.match(method, model, Budget(0.1, "cost"))) as h:
        assert h.report().tokens[-1][0] <= 2


def test_merged_sizes_bias_attention_and_weigh_pooling():
    """Merging exact duplicates must not change the output: proportional attention and weighted pooling see to it."""
    model = vit("average")
    x = images(1)
    x = x.repeat_interleave(1, 0)
    x[:, :, :, 8:16] = x[:, :, :, :8]  # patches at odd columns repeat their left neighbour
    x[:, :, :, 24:] = x[:, :, :, 16:24]
    with torch.no_grad():
        model.pos_embed.zero_()
        dense = model(x)
        with apply(ToMe(), model, Budget((8, 0, 0, 0, 0, 0, 0, 0, 0), "removed")) as handle:
            merged = model(x)
            assert handle.report().tokens[1][0] == 8
    assert torch.allclose(merged, dense, atol=1e-5)


def test_unknown_names_suggest():
    with pytest.raises(PrunelabError, match="did you mean zero_tprune"):
        registry.get("zero_prune")
    with pytest.raises(PrunelabError, match="no option 'layer'"):
        registry.create("zero_tprune", layer=3)
    with pytest.raises(PrunelabError, match="cannot read the method"):
        registry.parse("ZeroTPrune(layers=__import__('os'))")


@pytest.mark.parametrize(
    "asked",
    [{"rest": "bypass"}, {"positions": "decay"}, {"layout": torch.zeros(3, 17, 3)}],
    ids=lambda a: next(iter(a)),
)
def test_a_plan_the_family_cannot_carry_out_is_refused(asked):
    class Elsewhere(NormTokens):
        def plan(self, site, signals, budget):
            return replace(super().plan(site, signals, budget), **asked)

    model = vit()
    with torch.no_grad(), apply(Elsewhere(), model, 0.5), pytest.raises(PrunelabError, match="cannot carry out"):
        model(images())


def test_missing_services_and_signals_are_named():
    heard = []

    class Guided(NormTokens):
        services = ("frame_scorer",)

        def score(self, site, signals):
            heard.append(signals.services["frame_scorer"])
            return super().score(site, signals)

    class Texts(NormTokens):
        def requires(self, site):
            return frozenset({"text_rows"})

    with pytest.raises(PrunelabError, match="needs the services frame_scorer"), apply(Guided(), vit(), 0.5):
        pass
    with pytest.raises(PrunelabError, match="reads text_rows"), apply(Texts(), vit(), 0.5):
        pass
    model = vit()
    with torch.no_grad(), apply(Guided(), model, 0.5, services={"frame_scorer": "a second model"}):
        model(images())
    assert heard == ["a second model"]


def test_a_signal_not_required_is_not_given():
    class Curious(NormTokens):
        def score(self, site, signals):
            return signals.keys

    model = vit()
    with torch.no_grad(), apply(Curious(), model, 0.5), pytest.raises(AttributeError, match="was not required"):
        model(images())
