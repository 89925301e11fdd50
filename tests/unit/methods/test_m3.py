"""M3: nested scales, maps that squares do not divide, crops, and the least budget."""

from __future__ import annotations

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
    assert place.tolist() == [[r, c] for r in range(want.shape[2]) for c in range(want.shape[3])]


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
    want = squares((4, 4), 2)[0]
    parts = type(want)(*(part.expand(2, -1) for part in (want.target, want.source, want.weight)), want.outputs)
    assert torch.allclose(pooled[:, 3:7], parts.apply(dense[:, 3:19]), atol=1e-5)
    assert torch.equal(pooled[:, :3], dense[:, :3]) and torch.equal(pooled[:, 7:], dense[:, 19:])


@torch.no_grad()
def test_a_crop_keeps_one_token_at_least():
    model, given = vlm("llava"), prompt("llava", images("llava", 1))
    with apply(M3(), model, "0count"):
        assert model(**given).logits.shape[1] == given["input_ids"].shape[1] - 15
