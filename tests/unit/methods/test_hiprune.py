"""HiPrune: neighbours on borders, budgets too small for them, HiPrune++, and what large images and Qwen's keep."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.methods.hiprune.method import HiPrune, anchor_count, importance, ranked, with_neighbours, with_text
from tests.contract.vlms import images, prompt, typed, vlm


def places(mask):
    return mask[0].nonzero().squeeze(1).tolist()


def test_neighbours_clamp_as_released_or_are_dropped_as_written():
    """A grid of 3 x 4; rows run on into each other in both."""
    assert places(with_neighbours(torch.tensor([[5]]), 12, 4, "clamp")) == [1, 4, 5, 6, 9]
    assert places(with_neighbours(torch.tensor([[3]]), 12, 4, "clamp")) == [0, 2, 3, 4, 7]
    assert places(with_neighbours(torch.tensor([[3]]), 12, 4, "drop")) == [2, 3, 4, 7]
    assert places(with_neighbours(torch.tensor([[9]]), 12, 4, "clamp")) == [5, 8, 9, 10, 11]
    assert places(with_neighbours(torch.tensor([[11]]), 12, 4, "drop")) == [7, 10, 11]


def test_counts_round_half_to_even():
    assert [anchor_count(n, 0.1) for n in (64, 128, 192, 24, 25, 26)] == [1, 3, 4, 0, 0, 1]
    assert anchor_count(25, 0.5) == 2 and anchor_count(3, 9.0) == 3


def test_a_budget_smaller_than_anchors_and_buffers_keeps_anchors_first():
    middle = torch.tensor([[0.0, 0, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0]])
    last = torch.arange(12.0).unsqueeze(0)
    for keep, want in ((2, [5, 9]), (3, [1, 5, 9]), (12, list(range(12)))):
        index, _ = selection.top_k(ranked(middle, last, keep, 5.0 * 2 / keep, 4), keep)
        assert index.tolist() == [want]


def test_anchors_go_without_their_neighbours():
    middle, last = torch.zeros(1, 16), torch.arange(16.0).unsqueeze(0)
    middle[0, 5] = 1.0
    found = [selection.top_k(ranked(middle, last, 5, 1.0, 4, buffers=b), 5)[0][0].tolist() for b in (True, False)]
    assert found == [[1, 4, 5, 6, 9], [5, 12, 13, 14, 15]]


def test_more_tokens_are_those_most_like_the_text():
    scores = torch.tensor([[3.0, 2, 1, 0]])
    tokens = torch.tensor([[[9.0, 0], [1, 0], [1, 1], [0, 1]]])
    index, _ = selection.top_k(with_text(scores, 1, tokens, torch.tensor([[0.0, 2.0]])), 3)
    assert index.tolist() == [[0, 2, 3]]


def eager(family, pixels):
    model = vlm(family, tower=6)
    model.set_attn_implementation({"vision_config": "eager"})
    with torch.no_grad():
        maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    start = int(family == "llava" or family == "llava_next")
    return [importance(a.sum(2))[:, start:] for a in maps]


def test_the_model_reads_its_object_layer_and_the_one_that_gives_features():
    given = prompt("llava", images("llava", 2))
    maps = eager("llava", given["pixel_values"])
    with torch.no_grad(), apply(HiPrune(alpha=0.9, layer=2), vlm("llava", tower=6), Budget(7, "count")) as handle:
        logits = handle.adapter.model(**given).logits
        kept = handle.kept()[0][1]
    want, _ = selection.top_k(ranked(maps[2], maps[-2], 7, 0.9, 4), 7)
    assert torch.equal(kept, want) and logits.shape[1] == 7 + 7


def test_crops_share_the_budget_alike():
    model = vlm("llava_next", tower=6)
    given = prompt("llava_next", images("llava_next", 2))
    with torch.no_grad(), apply(HiPrune(alpha=0.5, layer=1), model, Budget(23, "count")) as handle:
        model(**given)
        kept = handle.kept()[0][1]
    assert (kept.view(2, 5, 4) // 16 == torch.arange(5).view(1, 5, 1)).all()
    maps = eager("llava_next", given["pixel_values"].flatten(0, 1))
    want, _ = selection.top_k(ranked(maps[1], maps[-2], 4, 0.5, 4), 4)
    assert torch.equal(kept.view(10, 4) % 16, want)


@pytest.mark.parametrize(("beta", "divisor", "more"), [(0.5, 1, 3), (0.5, 5, 1)])
def test_plus_keeps_more_than_the_budget_by_the_words_of_its_own_prompt(beta, divisor, more):
    model = vlm("qwen2_5_vl", tower=6)
    given = typed(model, prompt("qwen2_5_vl", images("qwen2_5_vl", 2)))
    given["input_ids"] = given["input_ids"].clone()
    given["input_ids"][1, :3] = torch.tensor([7, 8, 9])  # other words for the second picture
    method, plus = HiPrune(layer=2), HiPrune(layer=2, beta=beta, divisor=divisor)
    with torch.no_grad():
        with apply(method, model, Budget(6, "count")) as handle:
            model(**given)
            base = handle.kept()[0][1]
        with apply(plus, model, Budget(6, "count")) as handle:
            model(**given)
            kept = handle.kept()[0][1]
        features = torch.stack(list(model.model.get_image_features(
            given["pixel_values"], given["image_grid_thw"]).pooler_output))  # fmt: skip
        words = model.get_input_embeddings()(given["input_ids"][:, [0, 1, 2, -4, -3, -2, -1]]).mean(1)
    assert kept.shape[1] == 6 + more
    scores = torch.zeros(2, 16).scatter(1, base, 1.0)
    want, _ = selection.top_k(with_text(scores, 6, features, words), 6 + more)
    assert torch.equal(kept, want)
