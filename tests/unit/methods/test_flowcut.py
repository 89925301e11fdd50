"""FlowCut: where it cuts, smoothing over layers, and the second cut of large images, against loops."""

from __future__ import annotations

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import ModelInfo
from prunelab.methods.flowcut.method import FlowCut, importance, leaving, semantic
from tests.contract.vlms import images, prompt, vlm


def tower(depth: int) -> ModelInfo:
    return ModelInfo("test", 32, 4, 8, 600, tower=ModelInfo("tower", depth, 4, 8, 577, 1, True))


def test_cuts_end_before_the_layer_that_gives_the_features():
    assert [s.layer for s in FlowCut().sites(tower(23))] == list(range(2, 23, 2))  # CLIP of 24 layers
    assert [s.layer for s in FlowCut().sites(tower(6))] == [1, 3, 5]
    assert [(s.layer, s.where) for s in FlowCut(second=2).sites(tower(3))] == [(2, "tower"), (2, "input")]
    with pytest.raises(PrunelabError, match="two layers"):
        FlowCut().sites(tower(1))


def test_sharp_attention_sends_more_away_and_the_last_cut_all():
    even, sharp = torch.full((1, 100), 0.01), torch.zeros(1, 100).index_fill(1, torch.tensor([3]), 1.0)
    assert leaving(even, 20, 4) == 0 and leaving(sharp, 20, 4) == 40
    assert leaving(torch.cat([even, sharp]), 20, 4) == 40, "samples give up as many as the first to"
    assert leaving(even, 20, 0) == 80
    assert leaving(torch.rand(2, 9, device="meta"), 3, 4) == 0


@torch.no_grad()
def states(model, pixels):
    """Class rows and values of every layer, without pruning."""
    rows, values = [], []
    model.set_attn_implementation({"vision_config": "eager"})
    found = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    layers = [m for m in model.model.vision_tower.modules() if hasattr(getattr(m, "self_attn", None), "q_proj")]
    for layer, maps, hidden in zip(layers, found.attentions, found.hidden_states, strict=False):
        rows.append(maps[:, :, 0].mean(1)[:, 1:])
        values.append(layer.self_attn.v_proj(layer.layer_norm1(hidden)).unflatten(2, (3, -1)).transpose(1, 2))
    return rows, values


def test_the_score_is_smoothed_over_the_layers_before_the_first_cut():
    given = prompt("llava", images("llava", 2))
    rows, values = states(vlm("llava", tower=5), given["pixel_values"])  # features of layer 3: cuts before 1 and 3
    model = vlm("llava", tower=4)  # features of layer 2: one cut, before layer 2
    with torch.no_grad(), apply(FlowCut(decay=0.25), model, Budget(5, "count")) as handle:
        logits = model(**given).logits
        kept = handle.adapter.encoding.patches(1)
    rows, values = states(vlm("llava", tower=4), given["pixel_values"])
    score = None
    for row, value in zip(rows[:2], values[:2], strict=True):
        near = (value[:, :, :1] * value).sum(-1).softmax(-1).mean(1)[:, 1:]
        new = (row / row.sum(1, True) + near / near.sum(1, True)) * value.mean(1)[:, 1:].abs().sum(-1)
        score = new if score is None else 0.25 * score + 0.75 * new
    assert torch.equal(kept, score.topk(5).indices.sort().values)
    assert logits.shape[1] == 7 + 5


def test_the_decoder_cuts_a_large_image_to_its_budget():
    model = vlm("llava_next", tower=4)
    given = prompt("llava_next", images("llava_next", 2))
    with torch.no_grad(), apply(FlowCut(second=2, positions="original"), model, Budget(12, "count")) as handle:
        model(**given)
        (_, index) = handle.kept()[-1]
        assert handle.adapter.encoding.patches(1).shape[1] == 6, "half the budget of every crop"
    assert index.shape[1] == 7 + 12
    assert bool((index[:, -4:] >= 3).all())


def test_a_ratio_is_a_share_of_all_crops_where_the_decoder_cuts():
    budget = Budget(0.2)
    assert FlowCut().target(576, budget) == 115
    assert FlowCut(second=2).target(576, budget) == 576


def test_the_mean_token_stands_in_for_a_missing_class_token():
    model = vlm("llava_onevision", tower=6)
    given = prompt("llava_onevision", images("llava_onevision", 1))
    with pytest.raises(PrunelabError, match="cls_row"), apply(FlowCut(), model, 0.5):
        pass
    with torch.no_grad(), apply(FlowCut(flow="mean"), model, Budget(4, "count")) as handle:
        model(**given)
        assert handle.adapter.encoding.patches(0).shape[1] == 4


def test_importance_is_the_sum_of_shares_times_the_values_size():
    values = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    near = semantic(values[:, :, :1], values)
    assert torch.allclose(near, torch.tensor([[1.0, 0.0]]).softmax(-1))
    score = importance(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]), values[0])
    assert score.tolist() == [[0.75, 2.5]]


@torch.no_grad()
def test_one_cut_behind_the_projector_goes_by_the_score_over_the_last_layers():
    model, pixels = vlm("llava", tower=5), images("llava", 1)
    method = FlowCut(flow="mean", last=3, positions="original")
    with apply(method, model, "5count") as handle:
        model(**prompt("llava", pixels))
        ((site, kept),) = handle.kept()
    assert (site.layer, site.where) == (0, "projected")
    _, values = states(model, pixels)
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    score = None
    for layer in (1, 2, 3):  # of four before the features
        value, attention = values[layer], maps[layer].sum(2).mean(1)[:, 1:]
        near = semantic(value[:, :, 1:].mean(2, keepdim=True), value[:, :, 1:])
        own = importance(attention, near, value.mean(1)[:, 1:])
        score = own if score is None else 0.5 * score + 0.5 * own
    assert kept[0].tolist() == score.topk(5).indices.sort().values[0].tolist()
    with apply(method, model, "5count") as handle:
        model(**prompt("llava", pixels.flip(-1)))
        model(**prompt("llava", pixels))
        ((_, again),) = handle.kept()
    assert torch.equal(kept, again), "nothing stays of the picture before"
