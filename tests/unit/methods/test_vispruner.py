"""VisPruner: rounds by hand, odd numbers, and crops."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.vispruner.method import VisPruner, selected, split, without_duplicates
from tests.contract.vlms import images, prompt, vlm


def test_a_round_drops_what_is_said_twice():
    tokens = torch.tensor([[[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 0, 1], [0.5, 1, 0], [0.3, 0.3, 1]]])
    # 0 is like 1, 4 like 1 a little, 2 hardly like anything
    assert without_duplicates(tokens, 5, each=1).tolist() == [[4, 2, 1, 3, 5]]
    assert without_duplicates(tokens, 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert without_duplicates(tokens, 1, each=8).shape == (1, 1), "also down to one"


@pytest.mark.parametrize("count", range(1, 18))
def test_any_number_of_tokens(count):
    generator = torch.Generator().manual_seed(count)
    scores, tokens = torch.rand(2, 17, generator=generator), torch.randn(2, 17, 4, generator=generator)
    for ratio in (0.0, 0.3, 1.0):
        index = selected(scores, tokens, count, ratio, each=3)
        assert index.shape == (2, count) and bool((index.diff(dim=1) > 0).all())
        best = scores.topk(split(count, ratio)[0], dim=1).indices
        assert bool((best.unsqueeze(2) == index.unsqueeze(1)).any(2).all()), "important ones stay"


@torch.no_grad()
def test_every_crop_keeps_as_many():
    model, given = vlm("llava_next"), prompt("llava_next", images("llava_next", 2))
    for newlines, most in ((True, 8), (False, 0)):
        with apply(VisPruner(newlines=newlines), model, Budget(5, "count")) as handle:
            model(**given)
        assert handle.kept()[0][1].unflatten(1, (5, 5)).div(16, rounding_mode="floor")[0, :, 0].tolist() == [
            0,
            1,
            2,
            3,
            4,
        ]
        assert 7 + 25 <= handle.report().tokens[0][0] <= 7 + 25 + most


def test_what_cannot_be_is_said():
    for bad, message in (({"ratio": 1.5}, "ratio must be"), ({"each": 0}, "each must be")):
        with pytest.raises(PrunelabError, match=message):
            VisPruner(**bad)
    with pytest.raises(PrunelabError, match="no class token"), apply(VisPruner(), vlm("llava_onevision"), 0.5):
        pass
