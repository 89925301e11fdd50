"""PruMerge: outliers, spacing, sums by hand, what a budget means, and crops."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.prumerge.method import PruMerge, merged, others, outlier_share, spatial, spatial_fixed
from tests.contract.kin import filmed, kin
from tests.contract.vlms import film, images, prompt, vlm


def test_outliers_lie_beyond_the_whisker():
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 100]])
    assert outlier_share(scores) == 1 / 8
    assert outlier_share(scores, 100) == 0
    assert outlier_share(torch.ones(2, 4)) == 0


def test_spacing_and_its_edges():
    assert spatial(12, 1 / 6).tolist() == [0, 2, 4, 6, 8, 10]
    assert spatial(4, 0).tolist() == [0, 1, 2] and spatial(4, 0.9).tolist() == [0, 1, 2]
    assert spatial_fixed(12, 1 / 4).tolist() == [2, 6, 10]
    assert spatial_fixed(576, 1 / 16).tolist() == list(range(8, 575, 16))
    assert others(torch.tensor([[3, 1]]), 5).tolist() == [[0, 2, 4]]
    assert others(torch.tensor([[3, 3]]), 5).tolist() == [[1, 2, 4]], "as released, the first of the rest is lost"


def test_sums_by_hand():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    keys = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]])
    matrix = merged(scores, keys, torch.tensor([[1, 3]]), neighbours=1).matrix(4)[0]
    assert matrix.tolist() == [
        pytest.approx([0.1, 1, 0, 0]),
        pytest.approx([0, 0, 0.2, 1]),
        pytest.approx([0.1, 0, 0.2, 0]),
    ]


@pytest.mark.parametrize(("family", "crops"), [("llava", 1), ("llava_next", 5)])
@torch.no_grad()
def test_what_a_budget_means(family, crops):
    model, given = vlm(family), prompt(family, images(family, 2))
    for count in (0, 1, 4, 16):
        for plus, kept in ((False, count), (True, {1: 0, 16: 15}.get(count, count))):
            with apply(PruMerge(adaptive=False, plus=plus), model, Budget(count, "count")) as handle:
                model(**given)
            assert handle.report().tokens[0][0] == 7 + crops * (kept + 1), (count, plus)
    for plus in (False, True):
        with apply(PruMerge(plus=plus, whisker=0.1), model, Budget(6, "count")) as handle:
            model(**given)
            model.generate(**given, max_new_tokens=2, do_sample=False)
            report = handle.report()
        assert 7 + crops <= report.tokens[0][0] <= 7 + crops * 7 and report.macs < report.dense_macs


@pytest.mark.parametrize(("family", "pooling"), [("llava_onevision", "bilinear"), ("pllava", "none")])
@torch.no_grad()
def test_frames_of_a_video_are_merged_behind_the_projector(family, pooling):
    """With a class token and without; one question, as lengths differ."""
    model = kin(family) if family == "pllava" else vlm(family)
    given = filmed(family, model, (4,)) if family == "pllava" else film(family, words=(4,))
    where = {"where": "projected", "pooling": pooling, "attention": "class" if family == "pllava" else "received"}
    seen = {}
    for name, method in {
        "two": PruMerge(adaptive=False, **where),
        "outliers": PruMerge(whisker=0.1, **where),
    }.items():
        with apply(method, model, Budget(2, "count")) as handle:
            assert torch.isfinite(model(**given).logits).all()
            seen[name] = handle.report().tokens[0][0]
            assert model.generate(**given, max_new_tokens=2, do_sample=False).shape[1] > given["input_ids"].shape[1]
    text = int((given["input_ids"] != given["input_ids"].mode().values.max()).sum())
    assert seen["two"] - seen["outliers"] <= 8 and seen["two"] <= text + 4 * 3 + 1, seen


def test_what_cannot_be_is_said():
    with pytest.raises(PrunelabError, match="neighbours must be"):
        PruMerge(neighbours=0)
    with pytest.raises(PrunelabError, match="no class token"), apply(PruMerge(), vlm("llava_onevision"), 0.5):
        pass
