"""FastVID: cuts, counts and anchors at their edges, the three versions on a video, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from prunelab.common.apply import apply
from prunelab.common.core.errors import PrunelabError
from prunelab.common.measures.pooling_head import PoolingHead
from prunelab.methods.fastvid.method import (
    FastVID,
    Kept,
    by_frame,
    by_segment,
    gathered,
    last_of_groups,
    pooling_head,
    segments,
)
from tests.contract.vlms import film, typed, vlm


def test_cuts_are_forced_and_found():
    still = torch.tensor([0.99, 0.95, 0.98, 0.97])
    assert segments(still, 3, 0.9) == [(0, 1), (2, 3), (4, 4)]
    assert segments(still, 1, 0.9) == [(0, 4)]
    assert segments(torch.tensor([0.1, 0.95, 0.2]), 1, 0.9) == [(0, 0), (1, 2), (3, 3)]
    assert segments(still, 99, 0.9) == [(t, t) for t in range(5)]
    assert segments(torch.zeros(0), 8, 0.9) == [(0, 0)]


def test_counts_of_the_versions():
    assert by_frame((3, 3), 10, 0.4, 4) == {3: Kept(6, 4)}
    lossy = by_frame((0, 8), 10, 0.4, 4)
    assert {f: k.context for f, k in lossy.items() if k.context} == {0: 12, 4: 12, 8: 12}
    assert sum(k.context for k in by_frame((0, 5), 5, 0.6, 4).values()) == 18
    spread = by_segment(range(10), 164, 0.4, 4)
    assert {f: k.context for f, k in spread.items() if k.context} == {9: 22, 5: 22, 1: 21}
    assert sum(map(sum, spread.values())) == 164
    capped = by_segment([4], 60, 0.4, 4, 1, 30)
    assert capped == {4: Kept(15, 15)}
    assert by_segment([0], 2, 0.1, 4, 1, 30) == {0: Kept(1, 1)}


def test_a_group_is_its_last_frame():
    similarity = torch.tensor([0.99, 0.5, 0.96, 0.97])
    assert last_of_groups(similarity, (0, 4), 0.95) == [1, 4]
    assert last_of_groups(similarity, (2, 2), 0.95) == [2]


def test_an_anchor_keeps_its_least_weight_and_stays_alone_as_it_is():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [4.0, 0.0]])
    found = gathered(
        torch.nn.functional.normalize(tokens, dim=-1), torch.tensor([0, 1]), torch.tensor([2, 3]), slice(0, 4), 0.6
    )
    made = torch.zeros(2, 2).index_add(0, found.target, tokens[found.source] * found.weight.unsqueeze(1))
    assert torch.allclose(made, torch.tensor([[0.6 + 0.4 * 3, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("rule", ["frame", "segment", "groups"])
@torch.no_grad()
def test_versions_run_on_a_video(rule):
    family = {"frame": "llava_onevision", "segment": "llava_video", "groups": "qwen2_5_vl"}[rule]
    pooling = {"frame": "bilinear", "segment": "average", "groups": "none"}[rule]
    model = vlm(family)
    given = typed(model, film(family, frames=6))
    with apply(FastVID(count=2, rule=rule, pooling=pooling), model, 0.5) as handle:
        assert torch.isfinite(model(**given).logits).all()
        assert handle.report().tokens[0][0] < given["input_ids"].shape[1]


@torch.no_grad()
def test_the_service_is_siglips_own_head():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=24, patch_size=8)).eval()
    pixels = torch.randn(2, 3, 24, 24)
    features = encoder(pixels, output_hidden_states=True).hidden_states[-1]
    described, attention = PoolingHead(encoder)(features)
    assert torch.allclose(described, encoder(pixels).pooler_output, atol=1e-5)
    head = encoder.head
    weights = {"probe": head.probe, "attention_in_proj_weight": head.attention.in_proj_weight}
    weights |= {"attention_in_proj_bias": head.attention.in_proj_bias}
    for name, module in (("attention_out_proj", head.attention.out_proj), ("layernorm", head.layernorm)):
        weights |= {f"{name}_weight": module.weight, f"{name}_bias": module.bias}
    for number, module in ((0, head.mlp.fc1), (2, head.mlp.fc2)):
        weights |= {f"mlp_{number}_weight": module.weight, f"mlp_{number}_bias": module.bias}
    same = pooling_head(encoder.post_layernorm(features), weights, 3)
    assert torch.allclose(described, same[0], atol=1e-5) and torch.allclose(attention, same[1], atol=1e-5)
    with pytest.raises(PrunelabError, match="reads 24 channels"):
        PoolingHead(encoder)(features[..., :8])
    headless = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=24, patch_size=8, vision_use_head=False))
    with pytest.raises(PrunelabError, match="no pooling head"):
        PoolingHead(headless)


@torch.no_grad()
def test_the_pooling_head_is_a_service():
    model = vlm("llava_onevision")
    given = typed(model, film("llava_onevision"))
    with apply(FastVID(frames="head"), model, 0.5), pytest.raises(PrunelabError, match="pooling_head"):
        model(**given)

    def head(features):
        return features.mean(1), features.norm(dim=-1).softmax(-1)

    with apply(FastVID(frames="head"), model, 0.5, services={"pooling_head": head}):
        assert torch.isfinite(model(**given).logits).all()
    with apply(FastVID(), model, 0.1), pytest.raises(PrunelabError, match="give a larger"):
        model(**given)
