"""Average-pooled tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.methods.pooled_tokens.method import PooledTokens, pooled, regions, shares
from tests.contract.vlms import VLMS, film, images, prompt, typed, vlm


@given(st.integers(0, 50), st.integers(1, 12))
def test_shares_are_even(total, parts):
    found = shares(total, parts)
    assert sum(found) == total and max(found) - min(found) <= 1


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (5, 5), (2, 4), (7, 7)])
def test_products_are_adaptive_pooling(size):
    grid = (7, 7) if size != (2, 4) else (7, 14)
    maps = torch.randn(grid)
    weights, place = regions(size[0] * size[1], grid)
    want = nn.functional.adaptive_avg_pool2d(maps[None], size).flatten()
    assert torch.allclose(weights @ maps.flatten(), want, atol=1e-6)
    assert place.tolist() == [[y, x] for y in range(size[0]) for x in range(size[1])]


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_every_count_covers_the_map_once_over(height, width, data):
    count = data.draw(st.integers(1, height * width))
    weights, place = regions(count, (height, width))
    assert weights.shape == (count, height * width)
    assert torch.allclose(weights.sum(1), torch.ones(count))
    assert bool((weights > 0).any(0).all()), "no patch is left out"
    assert len(place.unique(dim=0)) == count
    assert place.tolist() == sorted(place.tolist())


def test_frames_share_and_those_without_a_token_go():
    mix, layout = pooled(3, 5, (2, 2))
    assert layout[:, 0].tolist() == [1, 3, 4]
    maps = torch.arange(20.0).view(1, 20, 1)
    assert mix.apply(maps).flatten().tolist() == [maps[0, 4 * t : 4 * t + 4].mean() for t in (1, 3, 4)]
    assert pooled(0, 5, (2, 2))[0].outputs == 0


def test_a_ratio_counts_from_what_the_model_reads_of_a_video():
    """Of LLaVA-OneVision's 3 x 3 patches a frame 2 x 2 are read: half of a video are 2 tokens a frame."""
    for family, newlines in (("llava_onevision", 1), ("llava_video", 4 * 1)):
        model, asked = vlm(family), film(family)
        with torch.no_grad(), apply(PooledTokens(), model, 0.5) as handle:
            output = model(**asked)
            assert output.logits.shape[1] == 7 + 4 * 2 + newlines
            assert handle.report(handle.adapter.prompt(frames=4, text=7)).tokens[0][0] == 7 + 4 * 2 + newlines
            words = model.generate(**asked, max_new_tokens=3, min_new_tokens=3)
        assert words.shape[1] == asked["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family", VLMS)
def test_images_become_so_many_tokens(family):
    model = vlm(family)
    given = typed(model, prompt(family, images(family, 2)))
    crops = 5 if family.startswith("llava_") else 1
    with torch.no_grad(), apply(PooledTokens(), model, Budget(4 * crops, "count")):
        read = model(**given).logits.shape[1]
    assert read == 7 + 4 * crops + (2 * crops if crops > 1 else 0), "two by two a crop, newlines behind rows"
