"""M3: nested scales, maps that squares do not divide, crops, and the least budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.methods.m3.method import M3, kernel, squares
from tests.contract.vlms import images, prompt, vlm


def test_coarser_sets_are_means_of_finer_ones():
    x = torch.randn(1, 576, 5)
    fine, coarse = (squares((24, 24), kernel(576, scale))[0].apply(x) for scale in (144, 36))
    again = squares((12, 12), 2)[0].apply(fine)
    assert torch.allclose(again, coarse, atol=1e-6)
    assert torch.allclose(squares((24, 24), kernel(576, 1))[0].apply(x), x.mean(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(("grid", "side"), [((24, 24), 5), ((6, 9), 4), ((3, 8), 2)])
def test_any_map_is_pooled_as_torch_does(grid, side):
    x = torch.randn(1, grid[0] * grid[1], 3)
    mix, place = squares(grid, side)
    want = torch.nn.functional.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), side)
    assert torch.allclose(mix.apply(x), want.flatten(2).transpose(1, 2), atol=1e-6)
    assert place.tolist() == [[0, r, c] for r in range(want.shape[2]) for c in range(want.shape[3])]


@torch.no_grad()
def test_a_model_reads_the_pooled_features():
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**given)
    hook.remove()
    with apply(M3(), model, "4count"):
        first = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
        )
        model(**given)
        first.remove()
    dense, pooled = seen  # 3 words, 16 visual tokens, 4 words
    want = squares((4, 4), 2)[0].of_batch(2, dense.device)
    assert torch.allclose(pooled[:, 3:7], want.apply(dense[:, 3:19]), atol=1e-5)
    assert torch.equal(pooled[:, :3], dense[:, :3]) and torch.equal(pooled[:, 7:], dense[:, 19:])


@torch.no_grad()
def test_a_crop_keeps_one_token_at_least():
    model, given = vlm("llava"), prompt("llava", images("llava", 1))
    with apply(M3(), model, "0count"):
        assert model(**given).logits.shape[1] == given["input_ids"].shape[1] - 15


def test_maps_behind_tokens_that_stay_pool_as_their_entries_say():
    mix, place = squares((4, 6), 2, maps=3, first=2)
    x = torch.randn(2, 2 + 3 * 24, 5)
    pooled = mix.of_batch(2, x.device).apply(x)
    assert torch.allclose(pooled, mix.matrix(x.shape[1]) @ x, atol=1e-6)
    assert torch.equal(pooled[:, :2], x[:, :2])
    assert place[:2].eq(-1).all() and place[2:].amax(0).tolist() == [2, 1, 2]


def test_squares_with_other_weights_are_any_mixture():
    mix = squares((4, 4), 2)[0].of_batch(1, torch.device("cpu"))
    x = torch.randn(1, 16, 3)
    assert torch.allclose(replace(mix, weight=2 * mix.weight).apply(x), 2 * mix.apply(x), atol=1e-6)
