"""FitPrune: recipes and what lies between them, what is deleted, and how a recipe is fitted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.common.costs.formulas import Decoder
from prunelab.methods.fitprune.fitting import fit, search
from prunelab.methods.fitprune.method import FitPrune, contributions, deletable, prefix, text_behind
from prunelab.methods.fitprune.recipes import RECIPES, left, left_of
from tests.contract.vlms import images, prompt, vlm


def test_the_recipes_are_those_of_the_authors():
    assert len(RECIPES) == 11 and {len(r) for r in RECIPES.values()} == {32}
    for percent, recipe in RECIPES.items():
        assert left(percent / 100, 32, 576) == left_of(recipe, 576)
        assert sum(recipe) < 576
    savings = [sum(left(p / 100, 32, 576)) for p in sorted(RECIPES)]
    assert savings == sorted(savings, reverse=True)


@pytest.mark.parametrize(("depth", "tokens"), [(4, 16), (28, 729), (40, 2880)])
def test_between_recipes_what_is_left_falls(depth, tokens):
    for saved in (0.0, 0.03, 0.35, 0.57, 0.9, 0.97, 1.0):
        found = left(saved, depth, tokens)
        assert len(found) == depth + 1 and found[0] == tokens
        assert all(b <= a for a, b in pairwise(found)) and found[-1] >= 0
    assert left(0.0, depth, tokens) == [tokens] * (depth + 1)
    assert left(1.0, 32, tokens)[1:] == [0] * 32


def test_contributions_are_sums_of_the_largest_head():
    attention = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    image = torch.tensor([[False, True, True, True, False, False]])
    text = text_behind(image)
    assert text.tolist() == [[False] * 4 + [True] * 2]
    own, cross = contributions(attention, image, text)
    most = attention.amax(1)[0]
    assert torch.allclose(own[0], most[1:4].sum(0) / 3) and torch.allclose(cross[0], most[4:].sum(0) / 2)
    assert torch.equal(contributions(attention, image, text & False)[1], torch.ones(1, 6))


def test_a_prefix_leaves_enough():
    received, image = torch.tensor([[9.0, 0.1, 0.4, 0.2, 0.3]]), torch.tensor([[False, True, True, True, True]])
    for floor, gone in ((1.0, 0), (0.95, 0), (0.85, 1), (0.65, 2), (0.45, 2), (0.3, 3), (0.0, 3)):
        assert int(prefix(received, image, torch.tensor([floor])).sum()) == gone, floor
    other = torch.tensor([[9.0, 0.1, 0.2, 0.4, 0.3]])
    sums = (torch.tensor([1.0]), torch.tensor([1.0]))
    assert deletable(received, other, image, 0.55, sums).tolist() == [[False, True, False, False, False]]


def test_a_search_ends_near_the_smallest_alpha_that_is_enough():
    decoder = Decoder(8, 16, 4)

    def deleted(alpha: float) -> torch.Tensor:
        return torch.tensor([[int(100 * alpha), 0, 0, 0]])

    trials = search(deleted, 0.3, 100, decoder)
    assert len(trials) == 7 and {t.reached for t in trials} == {True, False}
    best = min(t.alpha for t in trials if t.reached)
    assert all(t.alpha < best for t in trials if not t.reached)
    assert not any(t.reached for t in search(lambda alpha: torch.zeros(1, 4, dtype=torch.long), 0.3, 100, decoder))


def test_a_fitted_recipe_runs():
    model, given = vlm("llava", num_hidden_layers=6), prompt("llava", images("llava", 1))
    recipe = fit(model, [given, given | {"pixel_values": -given["pixel_values"]}], 0.3, 16, Decoder(32, 40, 6))
    assert len(recipe) == 6 and sum(recipe) > 0 and recipe[-1] == 0
    with torch.no_grad(), apply(FitPrune(recipe), model, 1.0) as handle:
        model(**given)
    assert [round(t) - 7 for t, _ in handle.report().tokens] == left_of(recipe, 16)[:-1]


def test_what_cannot_be_is_said():
    model, given = vlm("llava"), prompt("llava", images("llava", 1))
    with pytest.raises(PrunelabError, match="this model has 4"), apply(FitPrune((1, 2)), model, 1.0):
        pass
    with (
        pytest.raises(PrunelabError, match="give the budget 1"),
        torch.no_grad(),
        apply(FitPrune((1, 2, 0, 0)), model, 0.5),
    ):
        model(**given)
    with pytest.raises(PrunelabError, match="at least one prompt"):
        fit(model, [], 0.5, 16)
    with pytest.raises(PrunelabError, match="no alpha saves 100 %"):
        fit(model, [given], 1.0, 16, Decoder(32, 40, 4))
