"""VisionZip: merging by hand, what a budget means, crops, and encoders without a class token."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.visionzip.method import VisionZip, contextual_slots, raster, zipped
from tests.contract.vlms import film, images, prompt, vlm


def test_contextual_tokens_by_hand():
    metric = torch.tensor([[[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9], [0.2, 0.8]]])
    slot, weight = contextual_slots(metric, 2)  # targets 0 and 2
    assert slot.tolist() == [[0, 0, 1, 1, 1]]
    assert weight.tolist() == [[1.0, 1.0, 1.0, 0.5, 0.5]]
    alone, weight = contextual_slots(metric[:, :2], 2)
    assert alone.tolist() == [[0, 1]] and weight.tolist() == [[1.0, 1.0]], "a target that nobody chose"


def test_a_crop_is_special_tokens_then_dominant_then_contextual():
    scores = torch.tensor([[0.0, 5, 1, 4, 2, 3]])
    metric = torch.eye(6).unsqueeze(0)
    matrix = zipped(scores, metric, 1, 2, 1).matrix(6)[0]
    assert matrix[:3].nonzero().tolist() == [[0, 0], [1, 1], [2, 3]]
    assert matrix[3].tolist() == pytest.approx([0, 0, 1, 0, 0.5, 0.5])
    lost = zipped(scores, metric, 1, 2, 0)
    assert lost.outputs == 3 and int((lost.matrix(6) > 0).sum()) == 3


def test_raster_order_runs_over_crops():
    assert raster((2, 2), (1, 2)).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert raster((2, 2), (2, 1)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(("family", "crops"), [("llava", 1), ("llava_next", 5), ("llava_onevision", 5)])
@torch.no_grad()
def test_a_number_is_that_of_a_crop(family, crops):
    model, given = vlm(family), prompt(family, images(family, 2))
    for method in (VisionZip(), VisionZip(contextual=2), VisionZip(contextual=0), VisionZip(contextual=99)):
        for count in (0, 1, 5, 9):
            with apply(method, model, Budget(count, "count")) as handle:
                model(**given)
            assert handle.report().tokens[0][0] == 7 + crops * max(count, 1)


@torch.no_grad()
def test_frames_of_a_video():
    model = vlm("llava_onevision")
    with apply(VisionZip(), model, Budget(5, "count")) as handle:
        model.generate(**film("llava_onevision", words=(4,)), max_new_tokens=2, do_sample=False)
    assert handle.application.trace.attention[0] == 7 + 4 * 5


def test_what_cannot_be_is_said():
    with pytest.raises(PrunelabError, match="share must be"):
        VisionZip(share=1.5)
    with pytest.raises(PrunelabError, match="has only"), apply(VisionZip(), vlm("qwen2_5_vl"), 0.5):
        pass
    model, given = vlm("llava"), prompt("llava", images("llava", 1))
    with (
        torch.no_grad(),
        apply(VisionZip(positions="original"), model, 0.5),
        pytest.raises(PrunelabError, match="no place in the packed sequence"),
    ):
        model(**given)


@torch.no_grad()
def test_behind_a_projector_that_joins_patches():
    """Qwen's: without a class token, by what tokens receive, and merged by the means of their patches' keys."""
    model = vlm("qwen2_5_vl")
    with apply(VisionZip(where="projected", share=0.25), model, "8count") as handle:
        model(**prompt("qwen2_5_vl", images("qwen2_5_vl", 2)))
    assert [seen for seen, _ in handle.report().tokens] == [7 + 8] * 4
