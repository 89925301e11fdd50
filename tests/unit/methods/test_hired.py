"""HiRED: what speaks for a crop, what each gets, and images of other shapes."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.hired.method import HiRED, crop_budgets, regions, split
from tests.contract.vlms import IMAGE, ids, images, prompt, vlm


def test_regions_as_released_and_as_written():
    rows = regions((4, 4), 4, (2, 2), "rows").view(4, 4)
    assert rows.tolist() == [[0] * 4, [1] * 4, [2] * 4, [3] * 4]
    crops = regions((4, 4), 4, (2, 2), "crops").view(4, 4)
    assert crops.tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert regions((24, 24), 3, (1, 3), "crops").view(24, 24)[5].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert regions((24, 24), 3, (3, 1), "crops").bincount().tolist() == [192] * 3


def test_a_budget_is_shared_by_marks():
    early = torch.tensor([[9.0, 8, 7, 1, 1, 1, 6, 5]])
    region = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert crop_budgets(early, region, 2, 5, 4).tolist() == [[2, 1]], "rounded down"
    assert crop_budgets(early, region, 2, 3, 90).tolist() == [[8, 0]], "no more than it has"
    assert split(576, 0.5, 576, 5) == (288, 288)
    assert split(2880, 0.5, 576, 5) == (576, 2304)
    assert split(72, 1.0, 144, 5) == (72, 0)


@pytest.mark.parametrize(("newlines", "most"), [(True, 8), (False, 0)])
@torch.no_grad()
def test_large_images_keep_little_more_than_their_budget(newlines, most):
    model, given = vlm("llava_next"), prompt("llava_next", images("llava_next", 2))
    with apply(HiRED(newlines=newlines), model, 0.4) as handle:
        model(**given)
    visual = handle.report().tokens[0][0] - 7
    assert 32 - 4 <= visual <= 32 + most


@torch.no_grad()
def test_wide_and_tall_images_in_one_batch():
    model, pixels = vlm("llava_next"), torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = ids([[("text", 3), (IMAGE, n), ("text", 4)] for n in (52, 56)])
    sizes = torch.tensor([[32, 64], [64, 32]])
    for regions_ in ("rows", "crops"):
        method = HiRED(regions=regions_)
        with apply(method, model, 0.5):
            both = model(**given, pixel_values=pixels, image_sizes=sizes).logits[:, -1]
        for i, length in enumerate((52, 56)):
            alone = ids([[("text", 3), (IMAGE, length), ("text", 4)]])
            alone["input_ids"][0, :3] = given["input_ids"][i, -length - 7 : -length - 4]
            alone["input_ids"][0, -4:] = given["input_ids"][i, -4:]
            with apply(method, model, 0.5):
                one = model(**alone, pixel_values=pixels[i : i + 1], image_sizes=sizes[i : i + 1]).logits[:, -1]
            assert torch.allclose(both[i], one[0], atol=1e-5)


def test_what_cannot_be_is_said():
    for bad, message in (({"alpha": 1.5}, "alpha must be"), ({"regions": "quadrants"}, "regions must be")):
        with pytest.raises(PrunelabError, match=message):
            HiRED(**bad)
    model, given = vlm("llava_next"), prompt("llava_next", images("llava_next", 1))
    with pytest.raises(PrunelabError, match="nothing speaks for the crops"), apply(HiRED(1.0), model, 0.5):
        model(**given)
    with torch.no_grad(), apply(HiRED(1.0, newlines=False), model, Budget(9, "count")) as handle:
        model(**given)
    assert round(handle.report().tokens[0][0]) == 7 + 9
    with pytest.raises(PrunelabError, match="no class token"), apply(HiRED(), vlm("llava_onevision"), 0.5):
        pass
