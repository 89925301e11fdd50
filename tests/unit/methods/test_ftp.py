"""FTP: rankings, shares of blocks and their search, what tokens carry past blocks, training, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.evolution import Genetic
from prunelab.common.core.learned import PARTS
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.training.recipe import Recipe
from prunelab.common.training.tokens import lesson, train
from prunelab.methods.ftp.method import FTP, Router, priority, searched, shares
from tests.contract.vlms import images, prompt, vlm
from tests.unit.tokens.test_causal_lm import ids, model_of


def router(model, seed=0):
    torch.manual_seed(seed)
    return FTP().build(adapter_for(model).info)


def test_the_first_token_and_then_the_last_ones():
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    order = priority(real).masked_fill(~real, -1).argsort(dim=1, descending=True)
    assert order[0].tolist() == [0, 4, 3, 2, 1] and order[1, :3].tolist() == [2, 4, 3]


@pytest.mark.parametrize(
    ("weights", "mean", "most"), [((1, 1, 1), 0.3, 1.0), ((1, 2, 9), 0.5, 0.9), ((0, 0, 1), 0.6, 0.8)]
)
def test_shares_keep_their_mean_and_bound(weights, mean, most):
    found = shares(weights, mean, most)
    assert sum(found) / len(found) == pytest.approx(mean) and max(found) <= most + 1e-9
    assert sorted(found) == found, "who weighs more skips more"


def test_more_than_may_be_skipped_is_refused():
    with pytest.raises(PrunelabError, match=r"at most 0\.5 of the tokens"):
        shares((1, 2), 0.6, 0.5)
    for method in (FTP(router="static", most=0.5), FTP(router="static", most=0.5, schedule=(1.0, 2.0, 1.0))):
        model = vlm("llava")
        with pytest.raises(PrunelabError, match=r"at most 0\.5"), torch.no_grad(), apply(method, model, 0.2):
            model(**prompt("llava", images("llava", 1)))


def test_the_search_finds_shares_of_equal_mean():
    wanted = (0.1, 0.9, 0.3, 0.7)
    cost = lambda genes: sum((a - b) ** 2 for a, b in zip(genes, wanted, strict=True))  # noqa: E731
    found = searched(cost, [0.5] * 4, Genetic(12, 25))
    assert sum(found) == pytest.approx(2.0) and cost(found) < 0.25 * cost((0.5,) * 4)
    assert found == searched(cost, [0.5] * 4, Genetic(12, 25)), "the same by the same seed"


@torch.no_grad()
def test_blocks_skip_by_their_weights_and_tokens_come_back():
    model, tokens = model_of(), ids()
    parts = router(model)
    blocks = len(parts.weights)
    parts.weights = tuple(float(i + 1) for i in range(blocks))
    seen = []
    with apply(FTP(), model, 0.5, parts=parts) as handle:
        logits = model(tokens).logits
        seen = [through for through, _ in handle.report().tokens]
    assert logits.shape[1] == tokens.shape[1], "every place still says something"
    assert seen[0] == tokens.shape[1] and sorted(seen, reverse=True) == seen and seen[1] > seen[-1]
    due = shares(parts.weights, 1 - Budget(0.5).count(tokens.shape[1] - 1) / (tokens.shape[1] - 1))
    assert seen[1:] == pytest.approx([tokens.shape[1] - (tokens.shape[1] - 1) * d for d in due], abs=1.0)


@torch.no_grad()
def test_a_token_keeps_the_attention_of_the_last_block_that_it_went_through():
    model, tokens = model_of(), ids()
    factors = []

    class Watched(FTP):
        def factors(self, site, signals, skipped):
            found = super().factors(site, signals, skipped)
            factors.append((found, signals.state.get("went", (0, None))[1]))
            return found

    with apply(Watched(), model, 0.5, parts=router(model)):
        model(tokens)
    for (before, _), (now, went) in pairwise(factors):
        assert torch.equal(now[..., 1][~went], before[..., 1][~went]) and not torch.equal(now[..., 1], before[..., 1])
    places, ranks = factors[0][0][0, :, 0], factors[0][0][0, :, 2]
    assert places[0] == 0 and places[-1] == 1 and sorted(ranks.tolist()) == pytest.approx(places.tolist())


def test_three_losses_and_what_learns():
    model, tokens = model_of().train(), ids()
    parts = router(model)

    def loss(**weights):
        torch.manual_seed(1)
        method = FTP(**{"guide": 0.0, "constraint": 0.0, "distil": 0.0, **weights})
        return lesson(method, model, [Budget(0.5)], lambda net: net(tokens, use_cache=False), parts=parts)

    for weights in ({"guide": 1.0}, {"constraint": 1.0}, {"distil": 1.0}):
        parts.zero_grad()
        with torch.no_grad():
            parts.outer.bias.copy_(torch.tensor([-0.2, 0.2]))  # a little more is kept than is due
        loss(**weights).backward()
        assert parts.inner.weight.grad.abs().sum() > 0, weights
    bias = parts.outer.bias.detach()
    bias.copy_(torch.tensor([50.0, -50.0]))
    assert float(loss(constraint=1.0).detach()) == 0.0, "nothing asks for fewer tokens to be skipped"
    bias.copy_(torch.tensor([-50.0, 50.0]))
    assert float(loss(distil=1.0).detach()) == pytest.approx(0.0, abs=1e-4), "what skips nothing says the same"
    assert float(loss(constraint=1.0).detach()) == pytest.approx(0.5, abs=0.05)


def test_training_leaves_the_model_as_it_is():
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [{"input_ids": row} for row in torch.cat([ids(), ids().flip(1)])]
    recipe = Recipe(steps=3, batch=2, rate=1e-2)
    parts = train(FTP(), model, 0.5, data, recipe, learns="parts", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, PARTS) and not torch.equal(parts.inner.weight, router(model).inner.weight)
    with torch.no_grad(), apply(FTP(decides="router"), model, 0.5, parts=parts) as handle:
        model(ids())
        assert handle.report().tokens[0][0] == ids().shape[1]
    with pytest.raises(PrunelabError, match=r"call model\.train\(\) first"):
        lesson(FTP(), model.eval(), [Budget(0.5)], lambda net: net(ids(), use_cache=False), parts=parts)


def test_the_shares_of_blocks_are_stored_with_the_router():
    one, other = Router(3, 4), Router(3, 4)
    one.weights = (0.25, 0.5, 0.75)
    other.load_state_dict(one.state_dict())
    assert other.weights == (0.25, 0.5, 0.75)


def test_layers_and_schedules_longer_than_the_model_are_refused():
    model = vlm("llava")
    for method, said in ((FTP(layers=(9,), router="static"), "layers 0 to 3"),):
        with pytest.raises(PrunelabError, match=said), apply(method, model, 0.5):
            pass
    for schedule in ((1.0, 2.0), (1.0, 2.0, 3.0, 4.0)):
        with (
            pytest.raises(PrunelabError, match="and 3 blocks route"),
            apply(FTP(router="static", schedule=schedule), model, 0.5),
        ):
            pass
