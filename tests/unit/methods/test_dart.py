"""DART: how many stay, who chooses first, and prompts with little text."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo, Site
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.dart.method import DART, retained, set_order
from tests.contract.vlms import images, prompt, typed, vlm


def given(image: int, text: int, batch: int = 1, before: int = 2, seed: int = 0) -> TokenSignals:
    g = torch.Generator().manual_seed(seed)
    total = before + image + text
    keys, normed = torch.randn(batch, 2, total, 4, generator=g), torch.randn(batch, total, 8, generator=g)
    places = torch.arange(total).expand(batch, -1)
    sources = {"keys": lambda: keys, "normed": lambda: normed}
    prunable = (places >= before) & (places < before + image)
    return TokenSignals(sources, prunable=prunable, units=image, info=ModelInfo("t", 4, 2, 8, total), indices=places)


def kept(method: DART, signals: TokenSignals, budget: Budget) -> torch.Tensor:
    index = method.plan(Site(2, "input"), signals, budget).reduce.index
    return index[signals.prunable.gather(1, index)].view(len(index), -1)


@pytest.mark.parametrize(
    ("share", "left"), [(0.333, 188), (0.222, 124), (0.111, 60), (0.0, 4), (1.0, 576), (0.999, 572)]
)
def test_how_many_stay(share, left):
    assert kept(DART(), given(576, 20), Budget(share)).shape[1] == left


def test_each_pivot_takes_what_is_least_like_it():
    similarity = torch.tensor([[[0.9, 0.1, 0.3, 0.2, 1.0], [0.5, 0.0, 0.6, 0.7, 0.4]]])
    own = torch.tensor([[False, False, False, False, True]])
    score = retained(similarity, own, torch.ones(1, 2).bool(), torch.ones(1, 5).bool(), 1)
    assert score.argsort(descending=True).tolist() == [[4, 1, 0, 2, 3]], (
        "the pivot, the first's, the second's, the rest"
    )


def test_little_text_leaves_as_many_tokens():
    for text in (0, 2, 9):
        assert kept(DART(), given(100, text, batch=2), Budget(0.4)).shape == (2, 4 + 8 * 5)
    assert kept(DART(text_pivots=0), given(100, 9), Budget(0.4)).shape[1] == 4 + 4 * 10
    assert kept(DART(image_pivots=0), given(100, 9), Budget(0.4)).shape[1] == 4 * 10


def test_the_order_of_visits_is_an_option():
    index = torch.tensor([[444, 81, 203, 80, 617, 614, 620, 611]])
    order = set_order(index, torch.ones_like(index).bool())
    assert index.gather(1, order).tolist() == [[611, 614, 617, 203, 620, 80, 81, 444]]
    there = torch.tensor([[True] * 4 + [False] * 4])
    assert set(set_order(index, there)[0, :4].tolist()) == {0, 1, 2, 3}
    signals = given(200, 9, seed=3)
    assert not torch.equal(kept(DART(), signals, Budget(0.5)), kept(DART(visit="norm"), signals, Budget(0.5)))


@torch.no_grad()
def test_a_second_layer_prunes_what_is_left():
    model = vlm("llava_next", num_hidden_layers=6)
    with apply(DART((2, 4)), model, (0.5, 0.5)) as handle:
        model(**typed(model, prompt("llava_next", images("llava_next", 1))))
    visual = 16 + 8 * 9
    first = 4 + 8 * (visual // 16)
    assert [round(t) - 7 for t, _ in handle.report().tokens] == [visual] * 2 + [first] * 2 + [4 + 8 * (first // 16)] * 2


def test_what_cannot_be_is_said():
    for bad, message in (
        ({"image_pivots": 0, "text_pivots": 0}, "at least one pivot"),
        ({"text_pivots": -1}, "text_pivots must be"),
        ({"visit": "random"}, "must be one of set, norm"),
    ):
        with pytest.raises(PrunelabError, match=message):
            DART(**bad)
    with pytest.raises(PrunelabError, match="dart reads keys"), apply(DART((0,)), vlm("llava"), 0.5):
        pass


def test_the_set_is_made_of_a_list():
    """A dictionary's numbers lie in another order: its size is known when the set's table is made."""
    index = torch.tensor([[229, 345, 325, 636, 546, 552, 437, 638]])
    order = set_order(index, torch.ones_like(index).bool())
    assert index.gather(1, order)[0].tolist() == [546, 325, 229, 552, 437, 345, 636, 638]
