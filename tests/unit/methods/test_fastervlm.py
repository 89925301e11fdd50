"""FasterVLM: the score, the same number of every crop, and what a large image becomes."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.selection import top_k_of_parts
from prunelab.methods.fastervlm.method import FasterVLM, class_attention
from tests.contract.vlms import images, prompt, vlm


def test_every_crop_keeps_its_best():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2, 9.0, 8.0, 7.0, 6.0]])
    assert top_k_of_parts(scores, 2, 2).tolist() == [[1, 2, 4, 5]]
    assert top_k_of_parts(scores, 1, 2).tolist() == [[4, 5]]
    assert class_attention(torch.tensor([[[0.2, 0.4], [0.6, 0.0]]])).tolist() == [
        [pytest.approx(0.4), pytest.approx(0.2)]
    ]


@pytest.mark.parametrize("where", ["projected", "packed"])
def test_keeps_what_the_encoders_class_token_looks_at(where):
    model, eager = vlm("llava"), vlm("llava")
    eager.set_attn_implementation({"vision_config": "eager"})
    given = prompt("llava", images("llava", 2))
    with torch.no_grad():
        with apply(FasterVLM(where), model, Budget(5, "count")) as handle:
            model(**given)
            kept = handle.kept()[0][1]
        rows = eager.model.vision_tower(given["pixel_values"], output_attentions=True).attentions[-2][:, :, 0, 1:]
    best = rows.mean(1).topk(5).indices.sort(-1).values
    visual = kept if where == "projected" else kept[(kept >= 3) & (kept < 19)].view(2, 5) - 3
    assert torch.equal(visual, best)


def test_crops_of_a_large_image_keep_as_many_each():
    model = vlm("llava_next")
    given = prompt("llava_next", images("llava_next", 2))
    with torch.no_grad(), apply(FasterVLM(newlines=False), model, Budget(3, "count")) as handle:
        logits = model(**given).logits
        kept = handle.kept()[0][1]
    assert logits.shape[1] == 7 + 5 * 3
    assert (kept.view(2, 5, 3) // 16 == torch.arange(5).view(1, 5, 1)).all()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_encoders_without_a_class_token_are_refused(family):
    with pytest.raises(PrunelabError, match="no class token"), apply(FasterVLM(), vlm(family), 0.5):
        pass
