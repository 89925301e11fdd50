"""PLLaVA: pooled behind the projector, and its published file with adapters on queries and values."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaNextVideoConfig

from prunelab.common.backbones import pllava
from prunelab.common.core.errors import PrunelabError
from tests.contract.kin import kin

ADAPTED = ("q_proj", "v_proj")


def test_frames_are_pooled_behind_the_projector():
    model = kin("pllava").eval()
    films = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        found = model.model.get_video_features(films).pooler_output
        tower = model.model.vision_tower(films.flatten(0, 1), output_hidden_states=True).hidden_states
        patches = model.model.multi_modal_projector(tower[model.config.vision_feature_layer][:, 1:])
    maps = patches.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)  # rows and columns by twos
    assert torch.allclose(found, maps.unflatten(0, (2, 3)).flatten(1, 2), atol=1e-5)


@pytest.mark.parametrize("wrapped", ["base_layer.", ""])
def test_a_published_file_is_read_with_its_adapters_added(tmp_path, wrapped):
    model, fresh = kin("pllava").eval(), kin("pllava").eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    wanted, named = {}, {}
    torch.manual_seed(3)
    for name, weight in model.state_dict().items():
        wanted[name] = weight.clone()
        if name == "model.image_newline":
            wanted[name].zero_()
            continue
        told = name.replace("model.language_model.", "language_model.base_model.model.model.")
        told = told.replace("lm_head.", "language_model.base_model.model.lm_head.")
        told = told.replace("model.vision_tower.", "vision_tower.vision_model.")
        told = told.replace("model.multi_modal_projector.", "multi_modal_projector.")
        if told.split(".")[-2] in ADAPTED and told.startswith("language_model"):
            start = told.removesuffix("weight")
            down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
            named[f"{start}lora_A.default.weight"], named[f"{start}lora_B.default.weight"] = down, up
            wanted[name] += pllava.ALPHA / 4 * up @ down
            told = f"{start}{wrapped}weight"
        named[told] = weight.clone().contiguous()
    save_file(named, tmp_path / "model.safetensors")
    pllava.load_checkpoint(fresh, tmp_path)
    for name, weight in fresh.state_dict().items():
        assert torch.allclose(weight, wanted[name], atol=1e-4), name
    lone = next(name for name in named if "lora_B" in name)
    save_file({name: weight for name, weight in named.items() if name != lone}, tmp_path / "model.safetensors")
    with pytest.raises(PrunelabError, match="lacks its other half"):
        pllava.load_checkpoint(fresh, tmp_path)


def test_settings_of_its_like_are_its_own():
    made = pllava.like(LlavaNextVideoConfig())
    assert made.model_type == "pllava" and made.spatial_pool_stride == 2
