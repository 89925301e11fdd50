"""One contract for every registered token pruner: on synthetic signals (fast, many shapes) and on tiny models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import registry
from common.adapters import adapter_for
from common.apply import apply
from common.errors import PrunelabError
from common.roles import TokenPruner
from common.types import Budget, Gather, Site
from tests.contract.references import VITS, NormTokens, build, images, invariant, signals, vit

PRUNERS = [c for c in registry.load().values() if issubclass(c, TokenPruner)] + [NormTokens]
each = pytest.mark.parametrize("method", [c() for c in PRUNERS], ids=lambda m: m.name)
fast = settings(max_examples=15, deadline=None)


def site_of(method: TokenPruner, info) -> Site:
    return method.sites(info)[0]


def plan(method: TokenPruner, given, budget: Budget):
    return method.plan(site_of(method, given.info), given, budget)


# -- on signals ------------------------------------------------------------------------------------------------------


@each
@fast
@given(patches=st.integers(2, 40), special=st.integers(1, 2), ratio=st.floats(0, 1), seed=st.integers(0, 99))
def test_budget_is_met_exactly_and_protected_units_stay(method, patches, special, ratio, seed):
    given_signals, _ = signals(patches=patches, special=special, seed=seed)
    budget = Budget(ratio)
    reduce = plan(method, given_signals, budget).reduce
    kept = reduce.matrix(special + patches) > 0
    assert bool(kept[:, torch.arange(special), torch.arange(special)].all()) or not isinstance(reduce, Gather)
    assert bool(kept[:, :special, :special].any(-1).all()), "special tokens keep their places"
    assert reduce.outputs <= special + patches
    if "budget" not in method.exempt:
        assert reduce.outputs == special + budget.count(patches)


@each
def test_budget_exemption_is_real(method):
    if "budget" in method.exempt:
        given_signals, _ = signals(patches=30)
        with invariant("budget", method):
            for ratio in (0.1, 0.9):
                assert plan(method, given_signals, Budget(ratio)).reduce.outputs == 1 + Budget(ratio).count(30)


@each
def test_kept_units_come_in_order(method):
    given_signals, _ = signals(patches=30)
    reduce = plan(method, given_signals, Budget(0.5)).reduce
    if isinstance(reduce, Gather):
        index = reduce.index if reduce.valid is None else reduce.index.masked_fill(~reduce.valid, 10**6)
        assert bool((index.diff(dim=-1) >= 0).all()) == method.ascending


@each
def test_same_seed_same_plan(method):
    first, second = (plan(method, signals(seed=3)[0], Budget(0.4)).reduce.matrix(13) for _ in range(2))
    assert torch.equal(first, second)


@each
def test_batch_equals_single(method):
    whole, parts = signals(batch=3, patches=20)
    together = plan(method, whole, Budget(0.5)).reduce.matrix(21)
    with invariant("batch", method):
        for i in range(3):
            one = build(*(parts[n][i : i + 1] for n in ("q", "k", "v", "hidden")), None, 1)
            alone = plan(method, one, Budget(0.5)).reduce.matrix(21)[0]
            kept = together[i][together[i].sum(-1) > 0]
            assert torch.equal(kept > 0, alone > 0)


@each
@fast
@given(patches=st.integers(3, 25), pad=st.integers(1, 6), seed=st.integers(0, 50))
def test_padding_changes_nothing(method, patches, pad, seed):
    if "padding" in method.exempt:
        return
    bare, padded = signals(patches=patches, seed=seed)[0], signals(patches=patches, seed=seed, pad=pad)[0]
    want = plan(method, bare, Budget(0.6)).reduce.matrix(1 + patches).sum(1)
    got = plan(method, padded, Budget(0.6)).reduce.matrix(1 + patches + pad).sum(1)
    assert torch.equal(want > 0, got[:, : 1 + patches] > 0)
    assert not bool((got[:, 1 + patches :] > 0).any()), "padding is never kept"


@each
def test_padding_exemption_is_real(method):
    if "padding" in method.exempt:
        with invariant("padding", method):
            for seed in range(8):
                bare, padded = signals(patches=12, seed=seed)[0], signals(patches=12, seed=seed, pad=5)[0]
                want = plan(method, bare, Budget(0.6)).reduce.matrix(13).sum(1)
                got = plan(method, padded, Budget(0.6)).reduce.matrix(18).sum(1)
                assert torch.equal(want > 0, got[:, :13] > 0)


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_named(method, bad):
    if not method.requires(site_of(method, signals()[0].info)):
        pytest.skip("reads no signal")
    _, parts = signals()
    spoiled = {name: t.clone() for name, t in parts.items()}
    for t in spoiled.values():
        t[0, ..., 3, 2] = bad
    with pytest.raises(PrunelabError, match="NaN or infinite"):
        plan(method, build(spoiled["q"], spoiled["k"], spoiled["v"], spoiled["hidden"], None, 1), Budget(0.5))


@each
@pytest.mark.parametrize(("patches", "ratio"), [(1, 1.0), (1, 0.0), (5, 0.0), (5, 1.0)])
def test_edge_cases(method, patches, ratio):
    reduce = plan(method, signals(patches=patches)[0], Budget(ratio)).reduce
    assert 1 <= reduce.outputs <= 1 + patches


@each
def test_repr_round_trips(method):
    if type(method) is NormTokens:
        pytest.skip("reference methods are not registered")
    assert registry.parse(repr(method)) == method


# -- on models -------------------------------------------------------------------------------------------------------


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


def applicable(method: TokenPruner, family: str) -> bool:
    info = adapter_for(vit(family)).info
    return info.class_token or all("cls_row" not in method.requires(s) for s in method.sites(info))


@each
@pytest.mark.parametrize("family", VITS)
def test_keep_all_is_the_identity(method, family):
    if not applicable(method, family):
        pytest.skip(f"{method.name} needs a class token")
    model, x = vit(family), images()
    with torch.no_grad():
        dense = model(x)
        with apply(method, model, 1.0), invariant("keep_all", method):
            assert torch.allclose(model(x), dense, atol=1e-6, rtol=0)


@each
@pytest.mark.parametrize("family", VITS)
def test_pruned_model_runs_and_is_restored(method, family):
    if not applicable(method, family):
        pytest.skip(f"{method.name} needs a class token")
    model, x = vit(family), images()
    with torch.no_grad():
        dense, before = model(x), hooks(model)
        with apply(method, model, 0.5) as handle:
            pruned = model(x)
            report = handle.report()
            assert torch.isfinite(pruned).all()
            assert report.tokens[-1][1] < report.tokens[0][0]
            assert 0 < report.macs - report.scoring_macs < report.dense_macs
            assert torch.equal(model(x), pruned) or "batch" in method.exempt, "report leaves the method applied"
        assert hooks(model) == before
        assert torch.equal(model(x), dense)


@each
def test_no_hook_stays_after_an_exception(method):
    model = vit()
    before = hooks(model)
    with pytest.raises(RuntimeError), apply(method, model, 0.5):
        raise RuntimeError
    assert hooks(model) == before
    with pytest.raises(ValueError, match="unpack"), apply(method, model, 0.5):
        model(torch.randn(2, 3, 31, 31, 31))
    assert hooks(model) == before


@each
def test_model_batch_equals_single(method):
    model, x = vit(), images()
    with torch.no_grad(), invariant("batch", method):
        with apply(method, model, 0.5):
            together = model(x)
        alone = []
        for i in range(3):
            with apply(method, model, 0.5):
                alone.append(model(x[i : i + 1]))
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)


@each
def test_bfloat16_is_finite(method):
    model, x = vit().bfloat16(), images().bfloat16()
    with torch.no_grad(), apply(method, model, 0.5):
        assert torch.isfinite(model(x).float()).all()


@each
def test_nan_weights_are_named(method):
    if not method.requires(site_of(method, adapter_for(vit()).info)):
        pytest.skip("reads no signal")
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
        model.blocks[0].attn.qkv.weight[0, 0] = float("nan")
        with apply(method, model, 0.5), pytest.raises(PrunelabError, match="NaN or infinite"):
            model(images())


@each
def test_class_token_goes_first_through_every_site(method):
    model = vit()
    with torch.no_grad(), apply(method, model, 0.5) as handle:
        model(images())
        for _, origin in handle.kept():
            assert bool((origin[:, 0] == 0).all())
