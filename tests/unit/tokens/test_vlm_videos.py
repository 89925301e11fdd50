"""Videos in adapters of image and video language models: the same oracle, packing and newlines, and LLaVA-Video, which
is built of OneVision's modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch

from prunelab.common.apply import apply
from prunelab.common.backbones.llava_video import convert, load_checkpoint, official_name
from prunelab.common.core.budget import Budget
from prunelab.common.core.errors import PrunelabError
from prunelab.common.core.plan import Mix, Plan, Site
from prunelab.common.models import loading
from prunelab.common.tokens.adapters import adapter_for
from prunelab.common.tokens.role import TokenPruner
from prunelab.methods.divprune.method import DivPrune
from prunelab.methods.dycoke.method import DyCoke
from prunelab.methods.fastv.method import FastV
from prunelab.methods.fastvid.method import FastVID
from prunelab.methods.holitom.method import HoliTom
from prunelab.methods.prunevid.method import PruneVid
from prunelab.methods.quota.method import QuoTA
from prunelab.methods.random_drop.method import RandomDrop
from tests.contract.vlms import IMAGE, VIDEO, film, ids, images, processor, typed, vlm
from tests.unit.tokens.test_vlm import Reader, check_generation, oracle

MOVING = ("llava_onevision", "llava_video", "qwen2_5_vl")
every = pytest.mark.parametrize("family", MOVING)


@every
@pytest.mark.parametrize("method", [DivPrune(), FastV(), RandomDrop((2,), "input", positions="renumber")], ids=repr)
@pytest.mark.parametrize("how", ["greedy", "sampling", "beams"])
def test_videos_generate_as_the_oracle(family, method, how):
    model = vlm(family)
    check_generation(model, typed(model, film(family, words=(6, 3))), method, how)


@every
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize(
    "method",
    [
        RandomDrop((0,), "packed"),
        RandomDrop((0,), "packed", positions="renumber"),
        RandomDrop((0, 3), "input"),
        FastV(1),
    ],
    ids=repr,
)
def test_video_prefill_equals_the_oracle(family, method, left):
    model = vlm(family)
    given = typed(model, film(family, words=(6, 3), left=left))
    with torch.no_grad(), apply(method, model, 0.5) as handle:
        pruned, kept = model(**given), handle.kept()
    want = oracle(model, given, kept, getattr(method, "positions", "") == "renumber")
    for b, places in enumerate(kept[-1][1]):
        real = places >= 0
        assert torch.allclose(pruned.logits[b, real], want[b, places[real]], atol=5e-5)


def test_images_and_a_video_in_one_prompt():
    model, family = vlm("llava_video"), "llava_video"
    given = {
        "pixel_values": images(family, 2).unsqueeze(1),
        "image_sizes": torch.tensor([[40, 40]] * 2),
        "pixel_values_videos": film(family, words=(4,))["pixel_values_videos"],
        "batch_num_images": torch.tensor([2]),  # each of several images is one crop
    } | ids([[("text", 2), (IMAGE, 26), ("text", 1), (VIDEO, 24), ("text", 1), (IMAGE, 26), ("text", 3)]])
    with torch.no_grad():
        with apply(DivPrune(), model, 0.5) as handle:
            pruned, kept = model(**given).logits, handle.kept()
        assert pruned.shape[1] == 7 + 38
        assert torch.allclose(pruned[:, -1], oracle(model, given, kept, True)[:, -1], atol=5e-5)
        with apply(RandomDrop((0,), "projected", positions="renumber"), model, Budget(3, "count")) as handle:
            tokens = model(**given).logits.shape[1]
            video = handle.kept()[1][1][0]
    rows = {int(place) // 5 for place in video}
    assert tokens == 7 + 2 * (3 + 1) + 3 + len(rows), "one newline behind each image, one behind each row of the video"


class FrameMeans(TokenPruner):
    """One token a crop or frame, its mean, laid out in time: stands in for methods that resize."""

    name: ClassVar[str] = "frame_means"

    def sites(self, info: Any) -> list[Site]:
        return [Site(0, "projected")]

    def requires(self, site: Site) -> frozenset[str]:
        return frozenset({"hidden"})

    def plan(self, site: Site, signals: Any, budget: Budget) -> Plan:
        frames, batch = len(signals.grids), len(signals.hidden)
        per = signals.hidden.shape[1] // frames
        matrix = torch.eye(frames).repeat_interleave(per, 1).expand(batch, -1, -1) / per
        layout = torch.stack([torch.arange(frames), torch.zeros(frames), torch.zeros(frames)], 1).long()
        return Plan(Mix.from_matrix(matrix), layout.expand(batch, -1, -1), positions="renumber")


PACKED = pytest.mark.parametrize("family", ["llava_onevision", "llava_video"])


@PACKED
def test_videos_are_pruned_before_pooling_and_after_packing(family):
    model = vlm(family)
    given = film(family)
    side = {"llava_onevision": 3, "llava_video": 5}[family]
    with torch.no_grad():
        for method in (DivPrune(), FastV()):
            with apply(method, model, Budget(6, "count")) as handle:
                pruned, kept = model(**given).logits, handle.kept()
            assert pruned.shape[1] == 7 + 6
            want = oracle(model, given, kept, method.positions == "renumber")
            assert torch.allclose(pruned[:, -1], want[:, -1], atol=5e-5)
        reader = Reader(Site(0, "projected"), "received", "hidden")
        with apply(reader, model, 1.0), pytest.raises(PrunelabError, match="renumber"):
            model(**given)  # pooled tokens are mixtures of patches
        assert reader.read["received"].shape == (2, 3, 4 * side**2)
        assert reader.grids == ((side, side),) * 4
        with apply(FrameMeans(), model, 1.0):
            assert model(**given).logits.shape[1] == 7 + 4 + (1 if family == "llava_onevision" else 4)
            words = model.generate(**given, max_new_tokens=3, min_new_tokens=3, num_beams=2)
        assert words.shape == (2, given["input_ids"].shape[1] + 3)


@PACKED
def test_projected_plans_are_what_the_decoder_reads(family):
    """Frame means built by hand from the projector's features, then newlines, between the words."""
    model = vlm(family)
    given = film(family)
    with torch.no_grad():
        with apply(FrameMeans(), model, 1.0):
            got = model(**given).logits
        body = model.model
        hidden = body.vision_tower(given["pixel_values_videos"].flatten(0, 1), output_hidden_states=True)
        means = body.multi_modal_projector(hidden.hidden_states[-1]).mean(1).unflatten(0, (2, 4))
        newline = body.image_newline.expand(2, 1, -1)
        if family == "llava_video":
            means = torch.stack([means, newline.expand_as(means)], 2).flatten(1, 2)[:, :-1]
        words = model.get_input_embeddings()(given["input_ids"])
        sequence = torch.cat([words[:, :3], means, newline, words[:, -4:]], 1)
        want = model.lm_head(body.language_model(inputs_embeds=sequence).last_hidden_state)
    assert torch.allclose(got, want, atol=5e-5)


# -- LLaVA-Video -----------------------------------------------------------------------------------------------------


def test_frames_of_llava_video_are_plain_means_with_a_newline_behind_every_row():
    model = vlm("llava_video")
    given = film("llava_video", words=(4,))
    body = model.model
    with torch.no_grad():
        tower = body.vision_tower(given["pixel_values_videos"][0], output_hidden_states=True)
        maps = body.multi_modal_projector(tower.hidden_states[-1]).unflatten(1, (5, 5))
        got = body.get_video_features(given["pixel_values_videos"], return_dict=True).pooler_output
        plain = body.get_video_features(given["pixel_values_videos"], return_dict=False)
    want = []
    for frame in maps:
        for y in (0, 2):  # the fifth row and column are left out
            want += [frame[y : y + 2, x : x + 2].mean((0, 1)) for x in (0, 2)] + [body.image_newline]
    assert torch.allclose(got[0], torch.stack(want), atol=1e-6)
    assert any(torch.equal(part, got) for part in plain if torch.is_tensor(part))


def official(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """A model's weights under the authors' names, in two shards."""
    back = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
    }
    named = {}
    for name, weight in model.state_dict().items():
        start = next((here for here in back if name.startswith(here)), "")
        named[back.get(start, "") + name.removeprefix(start)] = weight.clone()
    folder.mkdir()
    for part in (0, 1):
        shard = {name: named[name] for name in sorted(named)[part::2]}
        safetensors.torch.save_file(shard, folder / f"model-0000{part + 1}-of-00002.safetensors")
    return named


def emptied() -> Any:
    model = vlm("llava_video")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def test_the_official_checkpoint_is_read_by_its_names(tmp_path):
    """Shards under the authors' names, made from a model, give that model again; a name too few is an error."""
    model, other = vlm("llava_video"), emptied()
    names = official(model, tmp_path / "official")
    assert {"model.embed_tokens.weight", "model.image_newline", "lm_head.weight"} <= names.keys()
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias" in names
    assert sorted(map(official_name, names)) == sorted(model.state_dict())
    load_checkpoint(other, tmp_path / "official")
    given = film("llava_video")
    with torch.no_grad():
        assert torch.equal(other(**given).logits, model(**given).logits)
    with pytest.raises(PrunelabError, match="missing"):
        load_checkpoint(other, tmp_path / "official" / "model-00001-of-00002.safetensors")
    with pytest.raises(PrunelabError, match="holds no"):
        load_checkpoint(other, tmp_path)


def test_an_official_checkpoint_becomes_a_folder_in_hub_layout(tmp_path):
    model = vlm("llava_video")
    official(model, tmp_path / "official")
    processor("llava_onevision").save_pretrained(tmp_path / "onevision")
    convert(tmp_path / "official", tmp_path / "onevision", tmp_path / "out", emptied())
    again, own = loading.vision_language({"folder": str(tmp_path / "out")}, {})
    assert type(own).__name__ == "LlavaVideoProcessor"
    given = film("llava_video")
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)
    with pytest.raises(PrunelabError, match="not empty"):
        convert(tmp_path / "official", tmp_path / "onevision", tmp_path / "out", emptied())


def test_a_saved_llava_video_is_one_again(tmp_path):
    from transformers import AutoModelForImageTextToText

    model = vlm("llava_video")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert adapter_for(again).family == "llava_video"
    given = film("llava_video")
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)


def test_the_published_size():
    from prunelab.common.backbones.llava_video import llava_video_7b

    with torch.device("meta"):
        model = llava_video_7b()
    assert 7.9e9 < sum(p.numel() for p in model.parameters()) < 8.1e9
    adapter = adapter_for(model)
    assert adapter.visual_tokens(adapter.prompt(frames=64)) == 64 * 13 * 14


@pytest.mark.parametrize("size", [12, 40])
def test_newlines_of_pruned_videos(size):
    """HoliTom in the grid's order: a newline behind each row that still holds a token, none behind others; and as many
    in the cost, where values are not known, as rows can hold one."""
    model = vlm("llava_video")
    given = film("llava_video", words=(4,))
    method = HoliTom(pooling="average", order="grid", similarity=0.99)
    with torch.no_grad(), apply(method, model, 0.5) as handle:
        tokens = model(**given).logits.shape[1]
        adapter = handle.adapter
        plan, _ = adapter.decide(handle.application, handle.application.sites[0], *adapter.projected("video", [0]))
    assert plan.layout is not None
    rows = plan.layout[0, :, :2].unique(dim=0)
    assert tokens == 7 + plan.reduce.outputs + len(rows)
    with apply(QuoTA("even"), model, Budget(size, "count")), torch.no_grad():
        frame = {12: 2 + 2, 40: 9 + 3}[size]  # of 3 tokens two rows of one, of 10 three of three, and their newlines
        assert model(**given).logits.shape[1] == 7 + 4 * frame


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@torch.no_grad()
def test_methods_on_videos_take_any_number_of_frames(frames):
    """One frame, and numbers that no group of two or four and no segment divides."""
    model = vlm("llava_onevision")
    given = typed(model, film("llava_onevision", frames, words=(4, 5)))
    methods = [HoliTom(), QuoTA(weighting="even"), FastVID(), FastVID(rule="segment"), FastVID(rule="groups")]
    methods += [DyCoke(), DyCoke(last_group="cut"), PruneVid(whole=1), PruneVid(similarity=-1.0)]
    for method in methods:
        with apply(method, model, 0.5) as handle:
            assert torch.isfinite(model(**given).logits).all(), method
            assert handle.report().tokens[-1][0] <= given["input_ids"].shape[1], method
