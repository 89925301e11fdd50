"""OpenVLA of our own: official names, what its parts compute, actions and chunks, also with tokens pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from prunelab.common.apply import apply
from prunelab.common.backbones.openvla import (
    PROMPT,
    ActionHead,
    OpenVLAForConditionalGeneration,
    convert,
    load_checkpoint,
    load_head,
    observed,
    official_name,
    openvla_7b,
)
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.tokens.adapters import adapter_for
from prunelab.methods.vla_pruner.method import VLAPruner
from tests.contract.kin import asked, kin
from tests.contract.vlms import IMAGE

STATS = {"table": {"action": {"q01": [0.0, -2.0], "q99": [4.0, 2.0], "mask": [True, False]}}}
SMALL = {"layer": 2, "action_layer": 1, "rounded": False}


def official(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """A model's weights under the authors' names, in two shards, with their settings."""
    back = {
        "model.vision_tower.": "vision_backbone.",
        "model.multi_modal_projector.": "projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    named = {}
    for name, weight in model.state_dict().items():
        start = next(here for here in back if name.startswith(here))
        theirs = back[start] + name.removeprefix(start)
        named[theirs.removesuffix("gamma") + "scale_factor" if theirs.endswith(".gamma") else theirs] = weight.clone()
    folder.mkdir()
    for part in (0, 1):
        shard = {name: named[name] for name in sorted(named)[part::2]}
        safetensors.torch.save_file(shard, folder / f"model-0000{part + 1}-of-00002.safetensors")
    settings = model.config.to_dict() | {
        "vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure", "norm_stats": STATS,
        "dtype": "float32", "arch_specifier": "no-align+fused-gelu-mlp",
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    return named


@torch.no_grad()
def test_the_official_checkpoint_becomes_a_folder_of_this_class_and_no_code_of_it_runs(tmp_path):
    model = kin("openvla")
    names = official(model, tmp_path / "official")
    assert {
        "vision_backbone.featurizer.blocks.0.ls1.scale_factor",
        "vision_backbone.featurizer.reg_token",
        "vision_backbone.fused_featurizer.attn_pool.latent",
        "projector.fc3.bias",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
    } <= names.keys()
    assert sorted(map(official_name, names)) == sorted(model.state_dict())
    convert(tmp_path / "official", tmp_path / "out")
    again = OpenVLAForConditionalGeneration.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    given = asked("openvla", model)
    assert torch.equal(again(**given).logits, model(**given).logits) and again.config.norm_stats == STATS
    with pytest.raises(PrunelabError, match="not empty"):
        convert(tmp_path / "official", tmp_path / "out")
    with pytest.raises(PrunelabError, match="missing"):
        load_checkpoint(again, tmp_path / "official" / "model-00001-of-00002.safetensors")
    with pytest.raises(PrunelabError, match="holds no"):
        load_checkpoint(again, tmp_path)


@torch.no_grad()
def test_features_are_those_behind_the_last_layer_but_one_of_both_encoders():
    model = kin("openvla")
    tower = model.model.vision_tower
    pixels = torch.randn(2, 6, 32, 32)
    states = []
    for encoder, part in ((tower.featurizer, pixels[:, :3]), (tower.fused_featurizer, pixels[:, 3:])):
        x = encoder._pos_embed(encoder.patch_embed(part))
        for block in encoder.blocks[:-1]:
            x = block(x)
        states.append(x[:, encoder.num_prefix_tokens :])
    assert [s.shape[1] for s in states] == [16, 16] and tower.featurizer.num_prefix_tokens == 5
    assert torch.allclose(tower(pixels), torch.cat(states, -1), atol=1e-5)


def test_the_published_size():
    with torch.device("meta"):
        model = openvla_7b()
    assert 7.5e9 < sum(p.numel() for p in model.parameters()) < 7.6e9
    adapter = adapter_for(model)
    assert adapter.family == "openvla" and adapter.visual_tokens(adapter.example()) == 256
    assert model.model.multi_modal_projector.fc1.weight.shape == (4 * (1024 + 1152), 1024 + 1152)


def test_pictures_stand_behind_the_first_token_and_the_empty_one_ends_a_prompt():
    model = kin("openvla")
    ids, mask = torch.tensor([[0, 1, 7], [1, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    given = model.with_image(ids, mask)
    first, second = given["input_ids"].tolist()
    assert first == [0, 1] + [IMAGE] * 16 + [7, 3] and second == [1] + [IMAGE] * 16 + [8, 9, 3]
    assert given["attention_mask"].sum(1).tolist() == [19, 20] and not given["attention_mask"][0, 0]
    assert model.with_image(torch.tensor([[1, 7, 3]]))["input_ids"].shape[1] == 19, "not twice"
    with pytest.raises(PrunelabError, match="padded in front"):
        model.with_image(ids, mask.flip(1))
    assert PROMPT.format("lift the cup") == "In: What action should the robot take to lift the cup?\nOut:"
    seen = observed(Image.new("RGB", (40, 20), (255, 0, 0)))
    assert seen.shape == (1, 6, 224, 224) and torch.allclose(seen[0, 3:, 0, 0], torch.tensor([1.0, -1, -1]))


def test_actions_are_the_middles_of_bins_in_the_units_of_their_data():
    model = kin("openvla")  # 64 words, of which 8 are padding
    found = model.actions(torch.tensor([55, 54, 0, 63]))
    assert found.tolist() == pytest.approx([-1 + 1 / 255, -1 + 3 / 255, -1 + 111 / 255, -1 + 1 / 255])
    with pytest.raises(PrunelabError, match="none is known"):
        model.scaled(found[:2])
    model.config.norm_stats = STATS
    assert model.scaled(torch.tensor([0.0, 0.5])).tolist() == [2.0, 0.5]
    with pytest.raises(PrunelabError, match=r"name the data set .* table"):
        model.scaled(torch.tensor([0.0, 0.5]), "other")


@torch.no_grad()
def test_a_chunk_is_read_off_one_pass_in_which_all_sees_all(tmp_path):
    """Spelled out on the decoder alone, sample by sample of a padded batch."""
    model = kin("openvla")
    given = asked("openvla", model, (4, 2))
    tokens, mask, pixels = (given[n] for n in ("input_ids", "attention_mask", "pixel_values"))
    found = model.chunk(tokens, mask, pixels, steps=2, size=3)
    torch.manual_seed(1)
    head = ActionHead(32, 16, 3)
    wanted = {f"module.model.{name}": weight.clone() for name, weight in head.state_dict().items()}
    torch.save(wanted, tmp_path / "action_head--1_checkpoint.pt")
    other = ActionHead(32, 16, 3)
    load_head(other, tmp_path / "action_head--1_checkpoint.pt")
    continuous = model.chunk(tokens, mask, pixels, steps=2, size=3, head=other)
    features = model.model.get_image_features(pixels).pooler_output
    for sample in range(2):
        row = tokens[sample, mask[sample].bool()]
        x = model.get_input_embeddings()(row)
        x[row == IMAGE] = features[sample]
        stop = model.get_input_embeddings()(torch.tensor([model.config.stop_token_id]))
        x = torch.cat([x, torch.zeros(6, 32), stop]).unsqueeze(0)
        everywhere = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
        first = int((mask[sample] == 0).sum())
        places = torch.arange(first, first + x.shape[1]).unsqueeze(0)
        out = model.model.language_model(inputs_embeds=x, attention_mask=everywhere, position_ids=places)
        states = out.last_hidden_state[0, len(row) - 1 : len(row) + 5]
        assert torch.allclose(found[sample].flatten(), model.actions(model.lm_head(states).argmax(-1)))
        assert torch.allclose(continuous[sample], head(states.view(2, 96)), atol=1e-5)


@torch.no_grad()
def test_a_pruned_chunk_keeps_what_is_to_be_kept():
    model = kin("openvla")
    given = asked("openvla", model, (4, 4))
    tokens, mask, pixels = (given[n] for n in ("input_ids", "attention_mask", "pixel_values"))
    dense = model.chunk(tokens, mask, pixels, 2, 3)
    with apply(VLAPruner(**SMALL, window=0), model, 1.0):
        assert torch.allclose(model.chunk(tokens, mask, pixels, 2, 3), dense)
    with apply(VLAPruner(**SMALL, window=0), model, Budget(4, "count")) as handle:
        assert model.chunk(tokens, mask, pixels, 2, 3).shape == (2, 2, 3)
        kept = handle.kept()[0][1]
    assert kept.shape[1] == tokens.shape[1] + 7 - 12
    assert torch.equal(model.chunk(tokens, mask, pixels, 2, 3), dense), "and everything is as before"


@torch.no_grad()
def test_vla_pruner_prunes_the_fourth_control_step_and_reset_begins_an_episode():
    model = kin("openvla")
    given = asked("openvla", model, (4, 2))
    given.pop("token_type_ids", None)
    total = given["input_ids"].shape[1]
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 7}
    with apply(VLAPruner(**SMALL), model, Budget(4, "count")) as handle:
        lengths = []
        for step in range(6):
            if step == 5:
                handle.reset()
            model.generate(**given, **greedy)
            lengths.append(handle.kept()[0][1].shape[1])
    assert lengths == [total, total, total, total - 12, total - 12, total]
