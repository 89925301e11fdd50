"""GlobalCom2: pictures cut into crops and back, what a crop gets, and images of other shapes."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.globalcom2.method import (
    GlobalCom2,
    class_logits,
    crop_scales,
    placed,
    spread,
    stitched,
    unstitched,
)
from tests.contract.vlms import IMAGE, film, ids, images, prompt, vlm


def test_crops_make_a_picture_and_back():
    x = torch.arange(2 * 6 * 12).view(2, 6, 12)
    picture = stitched(x, (3, 4), (2, 3))
    assert picture.shape == (2, 6, 12)
    assert picture[0, 0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27]
    assert torch.equal(unstitched(picture, (3, 4), (2, 3)), x)


def test_a_crop_gets_what_its_region_is_worth():
    scores = torch.zeros(1, 16)
    scores[0, :2] = 20.0  # of the first crop of four
    scales = crop_scales(scores, (4, 4), (2, 2), 0.25)
    assert scales[0, 0] > 0.4 and torch.allclose(scales[0, 1:], scales[0, 1])
    assert float(scales.mean()) == pytest.approx(0.25)
    assert crop_scales(scores, (4, 4), (2, 2), 0.9)[0, 0] == 1, "no more than it has"


def test_logits_are_those_of_the_class_token():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3 * 5, 4)
    found = class_logits(q, k, 3)
    want = (q[0, :, 1] * k[0, :, 5 + 2]).sum(-1).mean() / 2
    assert torch.allclose(found[0, 1, 2], want, atol=1e-5)


def test_padding_takes_no_part_and_shifts_places_as_released():
    valid = torch.ones(1, 16, dtype=torch.bool)
    valid[0, :4] = False  # the upper row is padding
    scores = torch.arange(16.0).unsqueeze(0)
    out = spread(scores, (4, 4), (1, 1), valid)
    assert bool((out[0, 0, :4] == 0).all()) and out[0, 0, 4] >= 0
    kept = torch.zeros(1, 1, 16, dtype=torch.bool)
    kept[..., [5, 15]] = True
    for how, cells in (("right", [5, 15]), ("released", [1, 11])):
        order, real, cell = placed(kept, valid, (4, 4), (1, 1), how)
        assert order.tolist() == [[5, 15]] and bool(real.all()) and cell.tolist() == [cells]


@pytest.mark.parametrize("options", [{}, {"interest": "attention"}, {"placement": "right"}], ids=str)
@torch.no_grad()
def test_images_of_other_shapes_in_one_batch(options):
    method = GlobalCom2(**options)
    model, pixels = vlm("llava_next", tower=4), torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sizes, lengths = torch.tensor([[30, 64], [64, 32]]), (16 + 4 * 9, 16 + 8 * 5)
    given = ids([[("text", 3), (IMAGE, n), ("text", 4)] for n in lengths])
    with apply(method, model, 0.5) as handle:
        both = model(**given, pixel_values=pixels, image_sizes=sizes).logits[:, -1]
    assert torch.isfinite(both).all()
    assert 24 <= handle.report().tokens[0][0] - 7 <= 24 + 8
    for i, length in enumerate(lengths):
        alone = {name: value[i : i + 1, -length - 7 :] for name, value in given.items()}
        with apply(method, model, 0.5):
            one = model(**alone, pixel_values=pixels[i : i + 1], image_sizes=sizes[i : i + 1]).logits[:, -1]
        assert torch.allclose(both[i], one[0], atol=1e-5)


@torch.no_grad()
def test_rows_that_hold_a_token_end_with_a_newline():
    model, given = vlm("llava_next"), prompt("llava_next", images("llava_next", 1))
    with apply(GlobalCom2(), model, 0.3) as handle:
        model(**given)
    kept = handle.kept()[0][1][0]
    crops = kept[kept >= 16] - 16
    rows = {(int(p) // 32, int(p) % 16 // 4) for p in crops}
    assert int((kept < 16).sum()) == int(0.3 * 16)
    assert round(handle.report().tokens[0][0]) == 7 + len(kept) + len(rows)


def test_what_cannot_be_is_said():
    for bad, message in (
        ({"temperature": 0.0}, "temperature must be"),
        ({"interest": "keys"}, "interest must be"),
        ({"placement": "left"}, "placement must be"),
    ):
        with pytest.raises(PrunelabError, match=message):
            GlobalCom2(**bad)
    with pytest.raises(PrunelabError, match="no class token"), apply(GlobalCom2(), vlm("llava_onevision"), 0.5) as h:
        h.adapter.model(**film("llava_onevision"))
