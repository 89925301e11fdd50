"""Applying: what is refused before work starts, and what the report says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.common.costs import meter
from prunelab.common.tokens import match
from prunelab.methods.ats.method import AdaptiveTokenSampling
from prunelab.methods.cls_attention.method import ClassAttention
from prunelab.methods.random_drop.method import RandomDrop
from prunelab.methods.tome.method import ToMe
from prunelab.methods.zero_tprune.method import ZeroTPrune
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
    assert meter.macs(model, torch.empty(1, 3, 32, 32, device="meta")) == hand


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
    budget = match.match(method, model, Budget(share, "cost"), x)
    with torch.no_grad(), apply(method, model, budget) as handle:
        model(x)
        report = handle.report()
    assert report.macs / report.dense_macs == pytest.approx(share, abs=0.03)


def test_a_cost_out_of_reach_gives_the_nearest_end():
    model = vit()
    method = ZeroTPrune(layers=(7, 8))
    with apply(method, model, match.match(method, model, Budget(0.1, "cost"))) as h:
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


class Learned(NormTokens):
    """Keeps the largest norms, remembers the ranking for its later sites, and passes what stays through a layer."""

    layers = (1, 4)

    def build(self, info):
        return nn.Linear(info.width, info.width)

    def score(self, site, signals):
        norm = signals.state.setdefault("ranking", signals.hidden.norm(dim=-1))
        return norm.gather(1, signals.indices)

    def refine(self, site, hidden, signals, plan):
        return signals.parts(hidden)


def test_learned_parts_belong_to_the_model_inside_the_block():
    model, method = vit(), Learned((1, 4))
    parts = method.build(ModelInfo("timm_vit", 9, 3, 24, 17))
    names = set(dict(model.named_parameters()))
    with apply(method, model, 0.5, parts=parts) as handle:
        assert set(dict(model.named_parameters())) - names == {"pruning_parts.weight", "pruning_parts.bias"}
        model(images()).sum().backward()
        with_layer = handle.report().macs
        first, second = (places for _, places in handle.kept())
    assert float(parts.weight.grad.abs().sum()) > 0, "the layer is trained through the pruned model"
    assert set(dict(model.named_parameters())) == names
    assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(first, second, strict=True)), "one ranking, two cuts"
    with torch.no_grad(), apply(NormTokens((1, 4)), model, 0.5) as handle:
        without = handle.report().macs
    assert with_layer - without == 24 * 24 * (9 + 5), "17 tokens, then 9, then 5"


def test_a_model_that_was_trained_with_a_method_brings_its_parts():
    model, method = vit(), Learned()
    model.add_module("pruning_parts", nn.Linear(24, 24))
    with torch.no_grad(), apply(method, model, 0.5):
        own = model(images())
    with torch.no_grad(), apply(method, model, 0.5, parts=nn.Linear(24, 24)):
        assert not torch.equal(model(images()), own)
    with torch.no_grad(), apply(method, model, 0.5):
        assert torch.equal(model(images()), own), "its own parts are back"


def test_missing_and_unfit_parts_are_named():
    small = nn.Linear(2, 2)
    with pytest.raises(PrunelabError, match="has learned parts"), apply(Learned(), vit(), 0.5):
        pass
    with pytest.raises(PrunelabError, match=r"do not fit.*weight"), apply(Learned(), vit(), 0.5, parts=small):
        pass
    with (
        pytest.raises(PrunelabError, match="leave `parts` out"),
        apply(NormTokens(), vit(), 0.5, parts=nn.Linear(2, 2)),
    ):
        pass


def test_sampling_is_counted_by_formula():
    grid = torch.empty(2, 5, 4, 2, device="meta")
    values = torch.empty(2, 8, 6, 6, device="meta")
    counted = meter.flops(lambda: nn.functional.grid_sample(values, grid, align_corners=False))
    assert counted == 2 * 5 * 2 * 8 * 5 * 4


def test_cost_of_one_module():
    model = vit()
    x = torch.empty(1, 3, 32, 32)
    parts = [meter.module_macs(model, x, f"blocks.{i}") for i in range(9)]
    assert sum(parts) == meter.module_macs(model, x, "blocks") < meter.macs(model, x)
    with pytest.raises(PrunelabError, match="spends nothing in a module 'encoder'"):
        meter.module_macs(model, x, "encoder")


def test_patch_numbers_leave_out_the_class_token_wherever_it_is():
    places = torch.tensor([0, 1, 3, 4, 5, -1])
    prefix = ModelInfo("a", 1, 1, 8, 9, special=1, class_token=True)
    middle = ModelInfo("b", 1, 1, 8, 9, special=1, class_token=True, class_index=4)
    assert prefix.patches(places).tolist() == [0, 2, 3, 4]
    assert middle.patches(places).tolist() == [0, 1, 3, 4]
