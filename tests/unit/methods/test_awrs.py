"""AWRS: what every estimator promises, against enumeration, and SMC on top of it against the whole posterior."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from prunelab.common.constrained import smc
from prunelab.common.constrained.constraints import Predicate
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.awrs import method as awrs
from prunelab.methods.awrs.method import AWRS, LocallyConstrained, TokenRejection

LOGITS = torch.tensor([2.0, 0.5, 0.0, -1.0, 1.5, -3.0])
ALLOWED = {1, 3, 5}
ALL = Budget(1.0)
PROPER = [
    (AWRS(), ALL), (AWRS("recursive"), ALL), (AWRS("recursive"), Budget(3, "count")), (AWRS("geometric"), ALL),
    (AWRS("geometric"), Budget(3, "count")), (AWRS("geometric", 4), Budget(5, "count")), (AWRS("adaptive"), ALL),
    (TokenRejection(), ALL), (TokenRejection(), Budget(2, "count")), (LocallyConstrained(proper=True), ALL),
]  # fmt: skip


def draws(sampler, budget, n, logits=LOGITS, allowed=ALLOWED, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [sampler.sample(logits, allowed.__contains__, budget, rng) for _ in range(n)]


@pytest.mark.parametrize(("sampler", "budget"), PROPER, ids=str)
def test_weights_are_unbiased_token_by_token(sampler, budget):
    assert sampler.proper
    n = 6000
    p = LOGITS.double().softmax(-1)
    found = torch.zeros(n, len(LOGITS), dtype=torch.float64)
    for i, (token, log_weight) in enumerate(draws(sampler, budget, n)):
        if token >= 0:
            found[i, token] = math.exp(log_weight)
    wanted = torch.tensor([float(p[x]) if x in ALLOWED else 0.0 for x in range(len(p))])
    error = found.std(0) / math.sqrt(n)
    assert ((found.mean(0) - wanted).abs() <= 4 * error + 1e-3).all(), (found.mean(0), wanted)
    assert abs(float(found.sum(1).mean() - wanted.sum())) <= 4 * float(found.sum(1).std()) / math.sqrt(n) + 1e-9


@pytest.mark.parametrize("sampler", [AWRS("none"), LocallyConstrained()], ids=str)
def test_without_weights_tokens_still_follow_the_restricted_model(sampler):
    assert not sampler.proper
    found = draws(sampler, ALL, 4000)
    assert {w for _, w in found} == {0.0}
    share = torch.bincount(torch.tensor([t for t, _ in found]), minlength=6) / 4000
    wanted = LOGITS.softmax(-1) * torch.tensor([x in ALLOWED for x in range(6)])
    assert torch.allclose(share, wanted / wanted.sum(), atol=0.03)


def exact(estimate, p, allowed, **options):
    """The expectation of weight times indicator over all random choices, by walking every order of draws."""

    class Scripted:
        """Stands in for numpy's generator: noise under which the Gumbel order is a given one."""

        def __init__(self, order):
            self.order = order

        def random(self, shape):
            keys = np.empty(shape)
            keys[list(self.order)] = -np.arange(len(p), dtype=float)
            return np.exp(-np.exp(np.log(p) - keys))  # the noise that gives these keys

    found = np.zeros(len(p))
    for order in itertools.permutations(range(len(p))):
        chance = math.prod(p[x] / (1 - sum(p[y] for y in order[:i])) for i, x in enumerate(order[:-1]))
        token, log_weight = estimate(np.log(p), allowed.__contains__, Scripted(order), **options)
        found[token] += chance * math.exp(log_weight)
    return found


@pytest.mark.parametrize("max_rejects", [math.inf, 2, 3])
@pytest.mark.parametrize("allowed", [{1, 3}, {0}, {0, 1, 2, 3, 4}, set()], ids=str)
def test_the_recursive_estimator_is_unbiased_exactly(max_rejects, allowed):
    p = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    wanted = p * [x in allowed for x in range(5)]
    assert exact(awrs.recursive, p, allowed, max_rejects=max_rejects) == pytest.approx(wanted, abs=1e-12)


def test_the_exact_walk_notices_a_bias():
    p = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    assert exact(awrs.one_pass, p, {1, 3}) != pytest.approx(p * [0, 1, 0, 1, 0], abs=1e-2)


def test_two_passes_is_unbiased_exactly():
    """Both passes enumerated: expected weight given the first is (1 - psi) times the mean of 1 / (rejections + 1)."""
    p, allowed = np.array([0.4, 0.25, 0.2, 0.1, 0.05]), {1, 3}

    def passes(left):
        """(chance, rejected, token) of one pass over the tokens left."""
        total = sum(p[x] for x in left)
        for x in left:
            if x in allowed:
                yield p[x] / total, (), x
            else:
                for chance, more, token in passes([y for y in left if y != x]):
                    yield p[x] / total * chance, (x, *more), token

    class Replayed:
        def __init__(self, *orders):
            self.orders = iter(orders)

        def random(self, shape):
            order = next(self.orders)
            keys = np.full(shape, -20.0)
            keys[list(order)] = -np.arange(len(order), dtype=float)
            with np.errstate(under="ignore"):
                return np.exp(-np.exp(np.log(p) - keys))

    found = np.zeros(5)
    for first, gone, token in passes(range(5)):
        for second, also, again in passes([x for x in range(5) if x not in gone]):
            rng = Replayed((*gone, token), (*also, again))
            got, log_weight = awrs.two_passes(np.log(p), allowed.__contains__, rng)
            assert got == token
            found[token] += first * second * math.exp(log_weight)
    assert found == pytest.approx(p * [0, 1, 0, 1, 0], abs=1e-12)


def test_gumbel_order_is_a_full_sort_and_skips_what_cannot_come():
    log_p = np.log(np.random.default_rng(1).dirichlet(np.ones(500)))
    log_p[7] = log_p[300] = -np.inf
    order = list(awrs.gumbel_order(log_p, np.random.default_rng(2)))
    keys = log_p - np.log(-np.log(np.random.default_rng(2).random(500)))
    assert order == np.argsort(-keys)[:498].tolist()


def test_rejection_and_the_geometric_estimator_weigh_alike():
    plain, counted = (
        torch.tensor([math.exp(w) for _, w in draws(s, ALL, 4000)]) for s in (TokenRejection(), AWRS("geometric"))
    )
    # plain rejection ends with the budget, which the other need not: compare where both are far from it
    for value in (1.0, 1 / 2, 1 / 3):
        assert (
            abs(
                float((plain - value).abs().lt(1e-9).double().mean() - (counted - value).abs().lt(1e-9).double().mean())
            )
            < 0.03
        )


@pytest.mark.parametrize(("sampler", "budget"), PROPER, ids=str)
def test_a_budget_bounds_the_calls(sampler, budget):
    for seed in range(200):
        asked = []
        sampler.sample(
            LOGITS, lambda t, a=asked: a.append(t) or t in ALLOWED, budget, torch.Generator().manual_seed(seed)
        )
        assert len(asked) <= budget.count(len(LOGITS))


def test_few_calls_on_a_large_vocabulary():
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 3
    asked = []
    for seed in range(20):
        AWRS().sample(logits, lambda t: asked.append(t) or t % 3 > 0, ALL, torch.Generator().manual_seed(seed))
    assert len(asked) / 20 < 6


@pytest.mark.parametrize(("sampler", "budget"), PROPER, ids=str)
def test_what_nothing_satisfies_is_a_dead_end(sampler, budget):
    assert set(draws(sampler, budget, 20, allowed=set())) == {(-1, -math.inf)}


def test_mistakes_are_named():
    with pytest.raises(PrunelabError, match="adaptive"):
        draws(AWRS(), Budget(2, "count"), 1)
    with pytest.raises(PrunelabError, match=r"budget of 1\.0"):
        draws(LocallyConstrained(), Budget(2, "count"), 1)
    with pytest.raises(PrunelabError, match="too few"):
        draws(AWRS("recursive"), Budget(1, "count"), 1)
    with pytest.raises(PrunelabError, match="too few"):
        draws(TokenRejection(), Budget(1, "count"), 1)
    with pytest.raises(PrunelabError, match="at least 2"):
        draws(AWRS("geometric", 1), ALL, 1)
    for broken in (torch.full((3,), math.nan), torch.full((3,), -math.inf), torch.zeros(2, 3)):
        with pytest.raises(PrunelabError, match="check the model"):
            draws(AWRS(), ALL, 1, logits=broken)


# -- SMC -------------------------------------------------------------------------------------------------------------

END = 3


class Bigram:
    """A model whose next token depends on the last one; remembers every row's whole text."""

    table = torch.tensor([[0.2, 1.5, 0.3, 0.0], [1.0, 0.1, 0.2, 0.4], [0.0, 0.3, -1.0, 1.0], [0.5, 0.4, 0.3, -2.0]])

    def start(self, particles):
        self.texts = [(0,)] * particles
        return self.table[[0] * particles]

    def feed(self, parents, tokens):
        self.texts = [(*self.texts[i], t) for i, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
        return self.table[tokens]


def in_language(text):  # an even number of ones, and no two twos in a row
    return text.count(1) % 2 == 0 and not any(a == b == 2 for a, b in itertools.pairwise(text)) and len(text) == 4


def prefix(text):
    return len(text) <= 4 and not any(a == b == 2 for a, b in itertools.pairwise(text))


CONSTRAINT = Predicate(prefix, in_language, END)


def posterior():
    found = {}
    for text in itertools.product(range(3), repeat=4):
        if in_language(text):
            steps = [0, *text], [*text, END]
            found[text] = math.prod(float(Bigram.table[a].softmax(-1)[b]) for a, b in zip(*steps, strict=True))
    return found


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampler", [AWRS(), AWRS("adaptive"), LocallyConstrained(proper=True)], ids=str)
def test_smc_estimates_the_mass_and_the_posterior_of_the_language(sampler, threshold):
    wanted = posterior()
    total = sum(wanted.values())
    rng = torch.Generator().manual_seed(1)
    n = 250
    estimates, mass = [], dict.fromkeys(wanted, 0.0)
    for _ in range(n):
        got = smc.run(sampler, Bigram(), CONSTRAINT, ALL, 8, threshold, 9, rng)
        estimates.append(math.exp(got.log_z))
        for text, weight, whole in zip(got.tokens, got.log_weights.exp().tolist(), got.complete, strict=True):
            if whole:
                mass[text] += weight / 8 / n
            else:
                assert weight == 0
    error = float(torch.tensor(estimates).std()) / math.sqrt(n)
    assert sum(estimates) / n == pytest.approx(total, abs=4 * error)
    distance = sum(abs(mass[t] - wanted[t]) for t in wanted) / total / 2
    assert distance < 0.12


def test_local_constraints_distort_what_weights_repair():
    wanted = posterior()
    total = sum(wanted.values())

    def distance(sampler):
        rng, mass = torch.Generator().manual_seed(2), dict.fromkeys(wanted, 0.0)
        for _ in range(150):
            got = smc.run(sampler, Bigram(), CONSTRAINT, ALL, 20, 0.5, 9, rng)
            for text, weight, whole in zip(got.tokens, got.posterior.tolist(), got.complete, strict=True):
                if whole:
                    mass[text] += weight / 150
        whole = sum(mass.values())
        return sum(abs(mass[t] / whole - wanted[t] / total) for t in wanted) / 2

    assert distance(AWRS()) < 0.5 * distance(LocallyConstrained())


def test_rows_follow_their_parents():
    """After any resampling the model's rows hold the particles' own texts."""
    model = Bigram()
    got = smc.run(AWRS(), model, CONSTRAINT, ALL, 6, 1.0, 9, torch.Generator().manual_seed(3))
    for text, fed in zip(got.tokens, model.texts, strict=True):
        assert fed[1 : len(text) + 1] == text


def test_a_cloud_that_dies_ends():
    never = Predicate(lambda text: len(text) < 3, lambda text: False, END)
    got = smc.run(AWRS(), Bigram(), never, ALL, 4, 0.5, 50, torch.Generator().manual_seed(0))
    assert got.log_z == -math.inf and not any(got.complete) and float(got.posterior.sum()) == 0
    assert got.draws == 4 * 3 and all(len(text) == 2 for text in got.tokens)


def test_texts_that_are_cut_off_are_not_complete():
    got = smc.run(AWRS(), Bigram(), CONSTRAINT, ALL, 4, 0.5, 2, torch.Generator().manual_seed(0))
    assert not any(got.complete) and all(len(text) == 2 for text in got.tokens) and got.log_z == -math.inf


def test_resampling_keeps_the_mean_weight_and_waits_for_the_threshold():
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0]).double().log()
    parents, after = smc.resample(weights, 1.0, torch.Generator().manual_seed(0))
    assert float(after.logsumexp(0)) == pytest.approx(math.log(8)) and 2 not in parents.tolist()
    kept, same = smc.resample(weights, 0.5)  # the effective size is 64 / 30, above 2
    assert kept.tolist() == [0, 1, 2, 3] and torch.equal(same, weights)
    dead = torch.full((3,), -math.inf)
    assert smc.resample(dead, 1.0)[0].tolist() == [0, 1, 2]


def test_smc_settings_are_checked():
    for options in ({"particles": 0}, {"max_tokens": 0}, {"threshold": 1.5}):
        with pytest.raises(PrunelabError, match="SMC needs"):
            smc.run(AWRS(), Bigram(), CONSTRAINT, ALL, **options)
