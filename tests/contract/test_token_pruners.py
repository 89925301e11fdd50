"""One contract for every registered token pruner: on synthetic signals (fast, many shapes) and on tiny models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelab.common.apply import apply
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Gather, Report, Site
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.apply import STAGES
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.random_drop.method import RandomDrop
from tests.contract.families import FAMILIES, SERVICES, applied, images, info, output, reason, usable
from tests.contract.references import NormTokens, build, invariant, signals, vit
from tests.contract.tokens_references import REFERENCES

EXTRA = (  # settings that bring a method to families its default does not reach
    NormTokens(),
    RandomDrop((0, 2), "input", "bypass"),
    RandomDrop((5, 7), rest="halt"),
    RandomDrop((0,), "packed"),
    RandomDrop((0,), "encoded", positions="renumber"),
    RandomDrop((0,), "projected", positions="renumber"),
)
PRUNERS = [c() for c in registry.load().values() if issubclass(c, TokenPruner)] + list(EXTRA) + list(REFERENCES)


def named(value: object) -> str:
    """An id that holds the registry name, so that `-k <slug>` finds every test of a method."""
    return f"{value.name}-{value!r}" if isinstance(value, TokenPruner) else str(value)


each = pytest.mark.parametrize("method", PRUNERS, ids=named)
fast = settings(max_examples=15, deadline=None)
PAIRS = [(m, f) for m in PRUNERS for f in FAMILIES if usable(m, f)]
each_pair = pytest.mark.parametrize(("method", "family"), PAIRS, ids=named)
FIRST = [(m, next(f for n, f in PAIRS if n is m)) for m in PRUNERS if any(n is m for n, _ in PAIRS)]
each_once = pytest.mark.parametrize(("method", "family"), FIRST, ids=named)


def site_of(method: TokenPruner, given) -> Site:
    """The method's first site in a model as deep as it is made for."""
    for depth in (given.depth, 6):
        try:
            return method.sites(replace(given, depth=depth))[0]
        except PrunelabError:
            continue
    raise AssertionError(f"{method} has no site")


def plan(method: TokenPruner, given, budget: Budget):
    given.parts, given.services = _parts(method, replace(given.info, depth=6)), SERVICES
    return method.plan(site_of(method, given.info), given, budget)


@cache
def _parts(method: TokenPruner, given):
    torch.manual_seed(0)
    parts = method.build(given)
    if parts is None:
        return None
    with torch.no_grad():
        for p in parts.parameters():  # uneven enough for what it says to depend on the context
            p.mul_(3.0 if p.dim() > 1 else 1.0)
    return parts.eval()


def prefix(method: TokenPruner, special: int) -> int:
    """Special tokens of the model the method is made for: a pyramid has none."""
    return 0 if method.rest == "bypass" else special


# -- on signals ------------------------------------------------------------------------------------------------------


@each
@fast
@given(patches=st.integers(2, 40), special=st.integers(1, 2), ratio=st.floats(0, 1), seed=st.integers(0, 99))
def test_budget_is_met_exactly_and_protected_units_stay(method, patches, special, ratio, seed):
    special = prefix(method, special)
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
        special = prefix(method, 1)
        given_signals, _ = signals(patches=29, special=special)
        with invariant("budget", method):
            for ratio in (0.1, 0.9):
                assert plan(method, given_signals, Budget(ratio)).reduce.outputs == special + Budget(ratio).count(29)


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
    special = prefix(method, 1)
    whole, parts = signals(batch=3, patches=20, special=special)
    together = plan(method, whole, Budget(0.5)).reduce.matrix(20 + special)
    with invariant("batch", method):
        for i in range(3):
            one = build(*(parts[n][i : i + 1] for n in ("q", "k", "v", "hidden")), None, special)
            alone = plan(method, one, Budget(0.5)).reduce.matrix(20 + special)[0]
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
        special = prefix(method, 1)
        with invariant("padding", method):
            for seed in range(8):
                bare, padded = (signals(patches=12, special=special, seed=seed, pad=pad)[0] for pad in (0, 5))
                want = plan(method, bare, Budget(0.6)).reduce.matrix(12 + special).sum(1)
                got = plan(method, padded, Budget(0.6)).reduce.matrix(17 + special).sum(1)
                assert torch.equal(want > 0, got[:, : 12 + special] > 0)


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_named(method, bad):
    if not method.requires(site_of(method, signals()[0].info)):
        return
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
    if method.name.startswith("reference_"):
        pytest.skip("reference methods are not registered")
    assert registry.parse(repr(method)) == method


# -- on models -------------------------------------------------------------------------------------------------------


@each
def test_some_family_runs_it(method):
    """A signal or a site that no family has is named here, for this method alone."""
    reasons = dict.fromkeys(reason(method, family) for family in FAMILIES)
    assert None in reasons, "; ".join(map(str, reasons))


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


def keeps_all(method: TokenPruner, family: str) -> bool:
    model, x = FAMILIES[family](), images(family)
    with torch.no_grad():
        dense = output(model, x)
        with applied(method, model, 1.0):
            kept = output(model, x)
    return torch.allclose(kept, dense, atol=2e-6, rtol=0)


@each_pair
def test_keep_all_is_the_identity(method, family):
    assert "keep_all" in method.exempt or keeps_all(method, family)


@each
def test_keep_all_exemption_is_real(method):
    if "keep_all" in method.exempt:
        assert not all(keeps_all(method, family) for m, family in PAIRS if m is method)


_DENSE: dict[str, float] = {}


def costed(handle, family) -> Report:
    """The handle's report; the unpruned model's MACs are counted once a family, as all methods see the same images."""
    report = handle.report(dense=_DENSE.get(family))
    _DENSE.setdefault(family, report.dense_macs)
    return report


def saves(report: Report) -> bool:
    return 0 < report.macs - report.scoring_macs < report.dense_macs


@each
def test_saving_exemption_is_real(method):
    if "saving" in method.exempt:
        found = []
        for family in (f for m, f in PAIRS if m is method):
            model = FAMILIES[family]()
            with torch.no_grad(), applied(method, model, 0.5) as handle:
                output(model, images(family))
                found.append(saves(costed(handle, family)))
        assert any(found) and not all(found)


@each_pair
def test_pruned_model_runs_and_is_restored(method, family):
    model, x = FAMILIES[family](), images(family)
    with torch.no_grad():
        dense, before, names = output(model, x), hooks(model), set(model.state_dict())
        with applied(method, model, 0.5) as handle:
            for _ in range(method.warm_up()):
                output(model, x)
            pruned = output(model, x)
            report = costed(handle, family)
            assert torch.isfinite(pruned).all()
            early = method.eases or any(site.where in STAGES for site in method.sites(info(family)))
            assert report.tokens[-1][1] < report.tokens[0][0] or method.rest == "bypass" or early
            assert min(mlp for _, mlp in report.tokens) < info(family).tokens
            assert saves(report) or method.rest == "bypass" or "saving" in method.exempt
            assert torch.equal(output(model, x), pruned) or "batch" in method.exempt, "report leaves the method applied"
        assert hooks(model) == before and set(model.state_dict()) == names
        assert torch.equal(output(model, x), dense)


@each_once
def test_no_hook_stays_after_an_exception(method, family):
    model = FAMILIES[family]()
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), applied(method, model, 0.5):
        raise ZeroDivisionError
    assert hooks(model) == before
    with pytest.raises((ValueError, RuntimeError, PrunelabError)), applied(method, model, 0.5):
        model(torch.randn(2, 3, 31, 31, 31))
    assert hooks(model) == before


def batch_equals_single(method: TokenPruner, family: str) -> bool:
    model, x = FAMILIES[family](), images(family)
    with torch.no_grad():
        with applied(method, model, 0.5):
            together = output(model, x)
        alone = []
        for i in range(3):
            with applied(method, model, 0.5):
                alone.append(output(model, x[i : i + 1]))
    return torch.allclose(together, torch.cat(alone), atol=5e-4)


@each_pair
def test_model_batch_equals_single(method, family):
    assert "batch" in method.exempt or batch_equals_single(method, family)


@each
def test_model_batch_exemption_is_real(method):
    if "batch" in method.exempt:
        assert not all(batch_equals_single(method, family) for m, family in PAIRS if m is method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_once
def test_half_precision_is_finite(method, family, dtype):
    model, x = FAMILIES[family]().to(dtype), images(family).to(dtype)
    with torch.no_grad():
        if dtype is torch.float16 and not torch.isfinite(output(model, x).float()).all():
            pytest.skip("the tiny model itself leaves the range of fp16")
    torch.manual_seed(0)
    parts = method.build(info(family))
    parts = None if parts is None else parts.eval().to(dtype)
    with torch.no_grad(), apply(method, model, 0.5, parts=parts, services=SERVICES):
        assert torch.isfinite(output(model, x).float()).all()


@each_once
def test_nan_weights_are_named(method, family):
    model = FAMILIES[family]()
    if not any(method.requires(site) for site in method.sites(info(family))):
        return
    with torch.no_grad():
        for name, p in model.named_parameters():  # what comes before and in the blocks, so that every signal is hit
            if p.dim() > 1 and "head" not in name:
                p.view(-1)[0] = float("nan")
        with applied(method, model, 0.5), pytest.raises(PrunelabError, match="NaN or infinite"):
            output(model, images(family))


@each_pair
def test_class_token_goes_through_every_site(method, family):
    if not info(family).class_token:
        return
    model, place = FAMILIES[family](), info(family).class_index
    with torch.no_grad(), applied(method, model, 0.5) as handle:
        model(images(family))
        for _, origin in handle.kept():
            assert bool((origin == place).any(1).all())
            assert bool((origin[:, 0] == 0).all()) or place


def test_refusal_before_work_names_what_is_missing():
    with pytest.raises(PrunelabError, match="tokens can halt"), apply(RandomDrop(rest="halt"), vit(), 0.5):
        pass
    with pytest.raises(PrunelabError, match="has only input"):
        adapter_for(FAMILIES["dino"]()).check(RandomDrop(rest="bypass"), RandomDrop(rest="bypass").sites(info("dino")))
