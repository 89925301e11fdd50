"""SparseVLM: raters, recycling by hand, versions, prompts of unlike length, and what it needs."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.methods.sparsevlm.method import (
    SparseVLM,
    best_heads,
    clusters,
    rated,
    recycled,
    rotary_response,
    text_raters,
)
from tests.contract.vlms import IMAGE, ids, images, prompt, vlm
from tests.unit.tokens.test_vlm import pair

PLUS = {"share": 0.0, "positions": "original", "debias": True, "heads": 2}


def test_words_above_the_mean_rate():
    visual, text = torch.eye(2).unsqueeze(0), torch.tensor([[[5.0, 5.0], [0, 0], [9, 9]]])
    seen, real = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, True, False]])
    assert text_raters(visual, text, seen, real).tolist() == [[True, False, False]]
    assert text_raters(visual, text[:, :1], seen, real[:, :1]).tolist() == [[True]], (
        "one word alone is no more than the mean"
    )
    attention = torch.tensor([[[[0.1, 0.9], [0.5, 0.5]], [[0.3, 0.7], [0.0, 0.0]]]])
    assert rated(attention, torch.tensor([[True, False]])).tolist() == [pytest.approx([0.2, 0.8])]
    mask = torch.tensor([[True, True]])
    assert torch.equal(best_heads(attention, mask, mask, 1), attention[:, :1])


def test_what_rotary_positions_prefer():
    response = rotary_response(torch.tensor([[7]]), torch.tensor([[7, 6, 0]]), 8, 10000.0)[0, 0]
    assert response[0] == pytest.approx(8 / 8**0.5) and response[0] > response[1] > response[2]


def test_recycling_by_hand():
    tokens = torch.tensor([[[0.0], [10], [1], [1.2], [50], [3], [9]]])
    visual = torch.tensor([[False, True, True, True, True, True, False]])
    scores = torch.tensor([[9.0, 5, 3, 2, 1, 4, 9]])
    mix = recycled(tokens, scores, visual, 5, 2, 0.5, 10, 0.0)
    assert mix.outputs == 5
    assert mix.apply(tokens)[0, :, 0].tolist() == pytest.approx([0, 10, 3, 1.1, 9], abs=1e-4), "the best two of three"
    assert recycled(tokens, scores, visual, 5, 5, 0.5, 10, 0.0).apply(tokens).equal(tokens)
    places = torch.tensor([[[0.0], [0.1], [0.3], [5.0], [5.1], [5.3], [9.0], [9.1], [9.3]]])
    slot = clusters(places, 3)[0].tolist()
    assert [slot[i : i + 3] for i in (0, 3, 6)] == [[n] * 3 for n in dict.fromkeys(slot)]
    assert sorted(set(slot)) == [0, 1, 2]


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "scale": 2.0, "bias": 1.0}, {"jitter": 1e-6}], ids=str)
@torch.no_grad()
def test_padded_prompts_are_as_if_alone(family, options):
    model = vlm(family)
    given = pair(family, model)
    method, budget = SparseVLM(layers=(1, 2), **options), Budget((9, 4), "count")
    with apply(method, model, budget) as handle:
        both = model(**given).logits[:, -1]
        model.generate(**given, max_new_tokens=3, do_sample=False)
        report = handle.report()
    assert report.tokens[1][0] < report.tokens[0][0] and report.tokens[3][0] < report.tokens[1][0]
    if "jitter" in options or family == "qwen2_5_vl":
        assert torch.isfinite(both).all()
        return
    mask = given["attention_mask"].bool()
    for b in range(2):
        alone = {n: t[b : b + 1] for n, t in given.items()}
        alone |= {n: alone[n][:, mask[b]] for n in ("input_ids", "attention_mask")}
        with apply(method, model, budget):
            assert torch.allclose(model(**alone).logits[0, -1], both[b], atol=1e-4)


@torch.no_grad()
def test_plus_keeps_places_and_merges_nothing():
    model, given = vlm("llava"), prompt("llava", images("llava", 2))
    with apply(SparseVLM(layers=(1, 2), **PLUS), model, Budget((8, 4), "count")) as handle:
        model(**given)
        assert handle.kept()[1][1].shape == (2, 7 + 4)
        assert bool((handle.adapter.running.positions[..., -1] == given["input_ids"].shape[1] - 1).all())


def test_what_cannot_be_is_said():
    with pytest.raises(PrunelabError, match="share=0 with debias"):
        SparseVLM(debias=True)
    with pytest.raises(PrunelabError, match="none of this model's 4 layers"), apply(SparseVLM((7,)), vlm("llava"), 0.5):
        pass
    model, pixels = vlm("llava"), images("llava", 1)
    given = {"pixel_values": pixels, **ids([[("text", 3), (IMAGE, 16)]])}
    with (
        torch.no_grad(),
        apply(SparseVLM((1,)), model, 0.5),
        pytest.raises(PrunelabError, match="no text stands behind"),
    ):
        model(**given)
