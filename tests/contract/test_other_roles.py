"""The contract of the roles beside token pruning, over registered methods and one reference method a role."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from prunelab.common.constrained.role import ConstrainedSampler
from prunelab.common.core import registry
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.common.ranking.sentences import Passage, SentenceRanker
from prunelab.common.speculative import Session
from prunelab.common.speculative.role import DraftDecoder
from tests.contract import references
from tests.contract.references import invariant


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


class Table:
    """A model whose next token depends on the last one alone: logits [V, V], which it makes of themselves. It reads
    trees as a target, and as the service `draft`."""

    def __init__(self, seed: int, vocabulary: int = 11) -> None:
        self.logits = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
        self.hidden = self.earlier = self.logits

    def read(self, tokens, tree, known=0, aside=None):
        read = [tokens[-1:], tree.tokens] if aside is None else [tokens[-1:], tree.tokens, aside.tokens]
        self.hidden = out = self.logits[torch.cat(read)]
        self.earlier = self.logits[tokens[:-1]]
        return out[known + 1 :] if known else out

    def keep(self, nodes):
        assert nodes.tolist() == sorted(nodes.tolist())


def session(method, budget, prompt):
    """The method at work behind a prompt, with what it asks for: random parts, a draft model, a store to search."""
    torch.manual_seed(0)
    parts = method.build(ModelInfo("table", depth=1, heads=1, width=11, tokens=99, vocabulary=11))
    learned = {} if parts is None else {"parts": parts.requires_grad_(False)}
    asked = {name: SERVICES[name] for name in method.services} | learned
    if method.reads_hidden:
        asked["output"] = torch.nn.Identity()
    started = Session(method, budget, method.start(11, **asked))
    started.begin(prompt)
    return started


def drafted(at_work, target, tokens):
    """A step behind the tokens; its tree must be one."""
    step = at_work.step(target, tokens)
    tree, accepted = step.tree, step.accepted
    assert tree.tokens.dtype == tree.parents.dtype == torch.int64
    assert bool((tree.parents < torch.arange(len(tree.tokens))).all()), "parents come first"
    assert bool(((tree.tokens >= 0) & (tree.tokens < len(target.logits))).all())
    assert len(accepted.nodes) == len(accepted.tokens) - 1
    assert torch.equal(tree.tokens[accepted.nodes], accepted.tokens[:-1])
    at_work.learn(step)
    return step


def spoken(table, token):
    """41 tokens that the table says, from this one on."""
    said = [token]
    while len(said) < 41:
        said.append(int(table.logits[said[-1]].argmax()))
    return said


TEXTS = torch.tensor([spoken(Table(0), first) for first in range(11)])
NOISE = torch.randint(11, (500,), generator=torch.Generator().manual_seed(0))
SERVICES = {"draft": Table(1), "store": torch.cat([TEXTS.flatten(), NOISE])}


@every(DraftDecoder, references.BigramDrafts)
@pytest.mark.parametrize("budget", [Budget(4, "count"), Budget(0, "count"), Budget(9, "count")], ids=str)
def test_drafts_never_change_greedy_decoding(method, budget):
    target = Table(0)
    plain = spoken(target, 3)
    texts = []
    for _ in range(2):
        at_work, out, steps = session(method, budget, torch.tensor([3])), [3], 0
        while len(out) < 41:
            step = drafted(at_work, target, torch.tensor(out))
            assert len(step.tree.tokens) <= int(budget.amounts[0])
            out += step.accepted.tokens.tolist()
            steps += 1
        texts.append(out)
        assert out[:41] == plain
        assert (steps < 40) == (int(budget.amounts[0]) > 0)
    assert texts[0] == texts[1], "the same state and text give the same drafts"


@pytest.mark.parametrize(
    "method", [c() for c in registry.load().values() if issubclass(c, DraftDecoder)], ids=lambda m: m.name
)
def test_drafts_never_change_the_distribution_of_samples(method):
    target, tokens = Table(0), torch.tensor([3, 7, 3])
    at_work = session(method, Budget(12, "count"), tokens)
    at_work.rng = torch.Generator().manual_seed(0)
    counts, confirmed, draws = torch.zeros(11), 0, 4000
    for _ in range(draws):
        accepted = drafted(at_work, target, tokens).accepted
        counts[accepted.tokens[0]] += 1
        confirmed += len(accepted.nodes)
    wanted = draws * target.logits[3].softmax(-1)
    assert stats.chisquare(counts, wanted * (counts.sum() / wanted.sum())).pvalue > 0.001
    assert confirmed > 0


@every(ConstrainedSampler, references.Rejection)
def test_sampler_obeys_and_follows_the_restricted_model(method):
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0])
    allowed = {1, 3}
    p = logits.double().softmax(-1) * torch.tensor([x in allowed for x in range(4)])
    rng = torch.Generator().manual_seed(0)
    found = torch.zeros(4000, 4, dtype=torch.float64)
    for row in found:
        asked: set[int] = set()
        token, log_weight = method.sample(
            logits, lambda t, asked=asked: asked.add(t) or t in allowed, Budget(4, "count"), rng
        )
        assert (token, log_weight) == (-1, -math.inf) or (token in allowed & asked and math.isfinite(log_weight))
        assert len(asked) <= 4
        if token >= 0:
            row[token] = math.exp(log_weight)
    mean, error = found.mean(0), found.std(0) / len(found) ** 0.5
    assert torch.allclose(mean / mean.sum(), p / p.sum(), atol=4 * float(error.max() / mean.sum()))
    if method.proper:
        assert ((mean - p).abs() <= 4 * error + 1e-9).all()


@every(ConstrainedSampler, references.Rejection)
def test_sampler_repeats_itself(method):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1))
    draws = [
        [method.sample(logits, lambda t: t % 3 == 0, Budget(30, "count"), rng) for _ in range(9)]
        for rng in (torch.Generator().manual_seed(5), torch.Generator().manual_seed(5))
    ]
    assert draws[0] == draws[1]
    assert len({token for token, _ in draws[0]}) > 1


@every(ConstrainedSampler, references.Rejection)
def test_sampler_ends_where_nothing_is_allowed(method):
    if isinstance(method, references.Rejection):  # an error is an end as well
        with pytest.raises(ValueError, match="no token"):
            method.sample(torch.zeros(9), lambda t: False, Budget(9, "count"))
    else:
        assert method.sample(torch.zeros(9), lambda t: False, Budget(9, "count")) == (-1, -math.inf)


@every(SentenceRanker, references.LengthRanker)
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


@every(SentenceRanker, references.LengthRanker)
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
