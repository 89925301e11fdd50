"""PruMerge: outliers, spacing, sums by hand, what a budget means, and crops."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.prumerge.method import PruMerge, merged, others, outlier_share, spatial, spatial_fixed
from tests.contract.vlms import images, prompt, vlm


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


def test_what_cannot_be_is_said():
    with pytest.raises(PrunelabError, match="neighbours must be"):
        PruMerge(neighbours=0)
    with pytest.raises(PrunelabError, match="no class token"), apply(PruMerge(), vlm("llava_onevision"), 0.5):
        pass
