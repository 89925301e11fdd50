"""FoPru: both strategies against loops, crops, and encoders with and without a class token."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.fopru.method import FoPru, of_rows, significance
from tests.contract.vlms import images, prompt, vlm


def test_significance_is_what_all_pay_or_patches_alone():
    received, own = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert significance(received).tolist() == [[2.0, 1.0]]
    assert significance(received, own).tolist() == [[1.0, 1.0]]
    assert of_rows(torch.tensor([[1.0, 2, 3, 4, 5, 6]]), 3).tolist() == [[6.0] * 3 + [15.0] * 3]


@torch.no_grad()
def eager(family, pixels, patches_only):
    model = vlm(family)
    model.set_attn_implementation({"vision_config": "eager"})
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions[
        -2 if family != "llava_onevision" else -1
    ]
    start = int(family != "llava_onevision")
    return maps[:, :, start * patches_only :, start:].sum(2).mean(1)


def kept(method, family, count):
    model, given = vlm(family), prompt(family, images(family, 2))
    with torch.no_grad(), apply(method, model, Budget(count, "count")) as handle:
        model(**given)
        return handle.kept()[0][1], given["pixel_values"]


@pytest.mark.parametrize("queries", ["all", "patches"])
def test_rank_keeps_the_most_significant(queries):
    index, pixels = kept(FoPru(queries=queries), "llava", 5)
    want = eager("llava", pixels, queries == "patches").topk(5).indices.sort().values
    assert torch.equal(index, want)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (6, 2), (9, 2), (16, 4)])
def test_rows_are_whole_and_the_best(count, rows):
    index, pixels = kept(FoPru(strategy="row"), "llava", count)
    sums = eager("llava", pixels, False).view(2, 4, 4).sum(2)
    for found, best in zip(index, sums.topk(rows).indices.sort().values.tolist(), strict=True):
        assert found.tolist() == [4 * row + column for row in best for column in range(4)]


@pytest.mark.parametrize(("strategy", "each"), [("rank", 3), ("row", 4)])
def test_crops_keep_as_many_each(strategy, each):
    index, pixels = kept(FoPru(strategy=strategy), "llava_next", 17)
    assert (index.view(2, 5, each) // 16 == torch.arange(5).view(1, 5, 1)).all()
    if strategy == "rank":
        want = eager("llava_next", pixels.flatten(0, 1), False).topk(3).indices.sort().values
        assert torch.equal(index.view(10, 3) % 16, want)


def test_patches_alone_need_a_class_token():
    with pytest.raises(PrunelabError, match="cls_row"), apply(FoPru(queries="patches"), vlm("llava_onevision"), 0.5):
        pass
