"""LongVA: frames are pooled and nothing is put between them; its processor counts as the model does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunelab.common.backbones import longva
from prunelab.common.catalogue import lookup
from prunelab.common.models import loading
from prunelab.common.rehearsal import checkpoints


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A look-alike of the published folder, read with the processor of one of OneVision's."""
    folder = tmp_path_factory.mktemp("longva")
    architecture = lookup.architecture("llava_onevision_0_5b")
    architecture["arguments"]["text_config"]["num_hidden_layers"] = 2
    checkpoints.transformers_model(architecture, folder / "like", seen=True)
    checkpoints.of_layout("longva", folder / "like", folder / "own")
    identity = {"folder": str(folder / "own"), "layout": "longva"}
    return loading.vision_language(identity, {}, {"folder": str(folder / "like")})


@torch.no_grad()
def test_a_video_is_read_as_pooled_frames(made):
    model, processor = made
    assert type(model) is longva.LongvaForConditionalGeneration
    film = np.random.default_rng(0).integers(0, 255, (3, 60, 80, 3), dtype=np.uint8)
    given = processor(text="<video> what", videos=[film], do_sample_frames=False, return_tensors="pt")
    assert given["pixel_values_videos"].shape[-2:] == (336, 336)
    shown = int((given["input_ids"] == model.config.video_token_id).sum())
    assert shown == 3 * 144
    given = given.to(dtype=model.dtype)
    features = model.model.get_video_features(
        given["pixel_values_videos"], vision_feature_layer=-2, vision_feature_select_strategy="default"
    ).pooler_output
    seen = model.model.vision_tower(given["pixel_values_videos"][0], output_hidden_states=True).hidden_states[-2]
    patches = model.model.multi_modal_projector(seen[:, 1:])
    wanted = patches.unflatten(1, (12, 2, 12, 2)).mean((2, 4)).flatten(0, 2)
    assert torch.allclose(features.flatten(0, -2), wanted, atol=1e-5)
    assert model(**given).logits.isfinite().all()
    assert model.config.text_config.rope_parameters["rope_theta"] == longva.THETA


def test_the_published_size():
    with torch.device("meta"):
        model = longva.longva_7b()
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 7.94
