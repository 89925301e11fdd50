"""The contract of the roles beside token pruning, over registered methods and one reference method a role."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import registry
from common.errors import PrunelabError
from common.roles import (
    CachePruner,
    ConstrainedSampler,
    DraftDecoder,
    Passage,
    Ranker,
    SampleSelector,
    Site,
)
from common.types import Budget
from tests.contract import references
from tests.contract.references import invariant, signals

fast = settings(max_examples=15, deadline=None)


def every(role: type, reference: type):
    found = [c() for c in registry.load().values() if issubclass(c, role)] + [reference()]
    return pytest.mark.parametrize("method", found, ids=lambda m: m.name)


TEXT = (
    "Pruning removes tokens that carry little information.",
    "A graph of sentences ranks the central ones first.",
    "Tokens that carry little information are pruned first.",
    "The weather stayed fine all week in the mountains.",
    "Central sentences in a graph summarise a document well.",
    "Little remains to be said about the weather there.",
)


@every(CachePruner, references.ReceivedCache)
@fast
@given(entries=st.integers(1, 30), ratio=st.floats(0, 1))
def test_cache_budget_order_and_identity(method, entries, ratio):
    given_signals, parts = signals(patches=entries, special=0)
    plan = method.plan(Site(0), given_signals, Budget(ratio))
    index = plan.reduce.index
    assert index.shape == (2, 3, Budget(ratio).count(entries))
    assert bool((index.diff(dim=-1) > 0).all())
    keys, values = method.compress(parts["k"], parts["v"], plan)
    assert keys.shape == values.shape == (2, 3, index.shape[-1], 8)
    if ratio == 1:
        assert torch.equal(keys, parts["k"])


@every(DraftDecoder, references.BigramDrafts)
def test_drafts_never_change_greedy_decoding(method):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(11, 11, generator=g)  # a model whose next token depends on the last one
    plain = [3]
    for _ in range(40):
        plain.append(int(table[plain[-1]].argmax()))
    state, out = method.start(11), [3]
    steps = 0
    while len(out) < 41:
        tree = method.draft(state, torch.tensor(out), Budget(4, "count"))
        assert len(tree.tokens) <= 4
        assert bool((tree.parents < torch.arange(len(tree.tokens))).all()), "parents come first"
        fed = torch.cat([torch.tensor(out[-1:]), tree.tokens])
        accepted = method.accept(tree, table[fed])
        method.observe(state, fed, table[fed])
        out += accepted.tokens.tolist()
        steps += 1
    assert out[:41] == plain
    assert steps < 40


@every(ConstrainedSampler, references.Rejection)
def test_sampler_obeys_and_is_unbiased(method):
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0])
    allowed = {1, 3}
    p = logits.softmax(-1)
    rng = torch.Generator().manual_seed(0)
    mass = torch.zeros(4)
    for _ in range(4000):
        token, log_weight = method.sample(logits, allowed.__contains__, Budget(4, "count"), rng)
        assert token in allowed
        mass[token] += math.exp(log_weight)
    share = mass / mass.sum()
    want = torch.tensor([0, p[1], 0, p[3]]) / (p[1] + p[3])
    # rejection without replacement over-samples the rarer token a little; the order must hold for any method
    assert torch.allclose(share, want, atol=0.12)


@every(SampleSelector, references.NormSamples)
@fast
@given(count=st.integers(1, 30), ratio=st.floats(0, 1))
def test_selector_budget_order_and_seed(method, count, ratio):
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))
    plans = [method.plan(features, Budget(ratio), torch.Generator().manual_seed(0)).reduce.index for _ in range(2)]
    assert plans[0].shape == (1, Budget(ratio).count(count))
    assert bool((plans[0].diff() > 0).all())
    assert torch.equal(*plans)


@every(Ranker, references.LengthRanker)
@pytest.mark.parametrize(
    "budget", [Budget(0.5), Budget(2, "count"), Budget(20, "words"), Budget(120, "bytes")], ids=str
)
def test_ranker_budget_order_and_seed(method, budget):
    passage = Passage(TEXT)
    kept = method.plan(passage, budget).reduce.index[0]
    assert bool((kept.diff() > 0).all())
    assert torch.equal(kept, method.plan(passage, budget).reduce.index[0])
    summary = method.summarise(list(TEXT), budget)
    assert summary == [TEXT[i] for i in kept.tolist()]
    with invariant("budget", method):
        if budget.unit in ("ratio", "count"):
            assert len(summary) == budget.count(len(TEXT))
        elif budget.unit == "words":
            assert sum(len(s.split()) for s in summary) <= 20
        else:
            assert len("\n".join(summary).encode()) <= 120


@every(Ranker, references.LengthRanker)
def test_ranker_edges(method):
    assert method.summarise(["One sentence alone stands here."], Budget(1, "count")) == [
        "One sentence alone stands here."
    ]
    with invariant("keep_all", method):
        assert method.summarise(list(TEXT), Budget(1.0)) == list(TEXT)
    assert method.summarise(list(TEXT), Budget(0, "count")) == []
    assert torch.isfinite(method.rank(Passage(TEXT))).all()
    for empty in ([], ["", "  "]):
        with pytest.raises(PrunelabError, match="no sentence"):
            method.summarise(empty, Budget(1, "count"))


@pytest.mark.parametrize("method", [c() for c in registry.load().values()], ids=lambda m: m.name)
def test_repr_round_trips_through_the_registry(method):
    assert registry.parse(repr(method)) == method
