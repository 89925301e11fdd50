"""Images made of captions: the testbed, a pipeline of diffusers, captions, distances, bad input."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from prunelab.common import tasks, testbeds
from prunelab.common.core.errors import PrunelabError
from prunelab.common.data import captions
from prunelab.common.measures import generate
from prunelab.common.measures.bench import Bench
from prunelab.common.metrics.generation import frechet_distance, recogniser
from prunelab.common.models import loading
from tests.contract.clips import tiny_clip

IDS = {name: {"loader": "digit_captions"} for name in ("data", "calibration")} | {
    "model": {"testbed": "digits_diffusion"}
}


def run(method=None, budget=None, **options):
    task = tasks.get("generate")
    settings = task.read({"samples": 30, "batch": 30, "calibration": 4, "steps": 6})
    return task().measure(Bench("testbed", IDS, settings, {}, method, options, budget))


def test_the_testbed_draws_what_is_asked_for_until_too_much_is_gone():
    dense, gone = run(), run("magnitude", "text_encoder=0.05,unet=0.05")
    assert dense["right"]["value"] >= 80 and dense["right"]["n"] == 30
    assert gone["right"]["value"] < 40 and gone["fid"]["value"] > 2 * dense["fid"]["value"]
    assert run()["fid"] == dense["fid"], "the same draws"
    assert gone["sparsity"]["value"] == pytest.approx(95, abs=0.5) and gone["saving"]["value"] == 0
    part = run("magnitude", "unet=0.5")
    assert part["saving"]["value"] == 0 and 10 < part["nonzero_saving"]["value"] < gone["nonzero_saving"]["value"]


def test_methods_that_measure_see_captions_and_calls():
    found = run("wanda", "text_encoder=0.9,unet=0.9")
    assert found["sparsity"]["value"] == pytest.approx(10, abs=1)
    assert run("sd_pruning", "text_encoder=0.5", way="owl_wanda")["right"]["value"] >= 0
    with pytest.raises(PrunelabError, match="has components; give a budget"):
        run("wanda", "0.5")


def test_the_testbed_is_what_its_log_says():
    model, log = testbeds.load("digits_diffusion")
    assert log["test"]["right"] > 0.9 and set(model.components) == {"text_encoder", "unet"}


def test_captions_are_of_digits():
    told = captions.of_digits(torch.arange(10), torch.Generator().manual_seed(0))
    ids = captions.encoded([caption.text for caption in told])
    assert ids.shape == (10, captions.LENGTH) and len({tuple(row) for row in ids.tolist()}) == 10
    with pytest.raises(PrunelabError, match="do not hold 'elephant'"):
        captions.encoded(["a elephant"])


def test_captions_of_coco_are_one_an_image(tmp_path):
    (tmp_path / "annotations").mkdir()
    notes = [{"image_id": i // 2, "caption": f"caption {i}"} for i in range(12)]
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)], "annotations": notes}
    path = tmp_path / "annotations" / "captions.json"
    path.write_text(json.dumps(content))
    entry = {
        "loader": "coco_captions",
        "setting": "coco",
        "images": "train",
        "annotations": "annotations/captions.json",
    }
    config = {"coco": str(tmp_path)}
    told = captions.drawn(entry, config, 4, 0)
    wanted = np.random.RandomState(0).choice(6, 4, replace=False)
    assert [caption.text for caption in told] == [f"caption {2 * i}" for i in wanted]
    assert [caption.of.name for caption in told] == [f"{i}.jpg" for i in wanted]
    with pytest.raises(PrunelabError, match="has 6 images with captions, and 7"):
        captions.drawn(entry, config, 7, 0)
    path.write_text("{")
    with pytest.raises(PrunelabError, match="COCO's format"):
        captions.drawn(entry, config, 1, 0)


def test_captions_are_lines_of_a_file(tmp_path):
    entry, config = {"loader": "caption_lines", "setting": "captions"}, {"captions": str(tmp_path)}
    with pytest.raises(PrunelabError, match=r"captions.txt cannot be read"):
        captions.drawn(entry, config, 1, 0)
    (tmp_path / "captions.txt").write_text("a dog\n\na cat\n")
    assert [caption.text for caption in captions.drawn(entry, config, 2, 0)] == ["a dog", "a cat"]
    with pytest.raises(PrunelabError, match="holds 2 captions, and 3"):
        captions.drawn(entry, config, 3, 0)
    with pytest.raises(PrunelabError, match="holds no captions"):
        captions.drawn({"loader": "c4"}, config, 1, 0)


def test_frechet_distance_is_that_of_gaussians():
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 4, generator=draws), 1 + torch.randn(40, 4, generator=draws) * torch.tensor([1, 2, 3, 0.5])
    one, two = np.cov(a.numpy().T), np.cov(b.numpy().T)
    apart = np.square(a.numpy().mean(0) - b.numpy().mean(0)).sum()
    wanted = apart + np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    with pytest.raises(PrunelabError, match="two images"):
        frechet_distance(a[:1], b)


def test_the_recogniser_knows_digits_it_has_not_seen():
    images, labels = captions.real_digits()
    assert float((recogniser()(images) == labels).float().mean()) > 0.97


def test_the_papers_networks_are_asked_for():
    with pytest.raises(PrunelabError, match="`inception` and `clip`"):
        generate.Networks(Bench("paper", {}, SimpleNamespace(seed=0), {}))


def test_weights_of_inception_are_tensors_alone(tmp_path):
    with pytest.raises(PrunelabError, match="holds no weights of Inception"):
        generate.inception(tmp_path, "missing.pth")
    torch.save({"code": SimpleNamespace}, tmp_path / "code.pth")
    with pytest.raises(PrunelabError, match="holds no weights of Inception"):
        generate.inception(tmp_path, "code.pth")


def test_images_become_what_inception_reads():
    picture = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    assert generate.sized(picture).shape == (3, 299, 299) and generate.sized(picture).dtype == torch.uint8


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, *tiny_clip(folder, ("a", "dog", "cat"))


def test_cosines_are_those_of_clips_features(clip_folder):
    folder, _, processor = clip_folder
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    painted = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    found = generate.cosines(model, processor, ["a dog", "a cat"], painted)
    assert found.shape == (2,) and bool((found.abs() <= 1).all())
    alone = generate.cosines(model, processor, ["a cat"], painted[1:])
    assert float(alone[0]) == pytest.approx(float(found[1]), abs=1e-5)


def test_a_pipeline_paints_and_its_text_encoder_is_pruned(clip_folder, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextModel(
        CLIPTextConfig(**sizes, vocab_size=6, max_position_embeddings=8, eos_token_id=2, pad_token_id=0)
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, norm_num_groups=4,
        layers_per_block=1, attention_head_dim=4, use_linear_projection=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=clip_folder[1], unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path)
    settings = tasks.get("generate").read({"samples": 2, "steps": 2, "calibration": 2})
    bench = Bench("paper", {"model": {"folder": str(tmp_path)}}, settings, {})
    painter = generate.of_diffusers(bench)
    assert painter.tokens(["a dog"]).shape == (1, 8)
    painted = painter.paint(["a dog", "a cat"], 0)
    assert painted.dtype == torch.uint8 and painted.shape[:2] == (2, 3)
    assert torch.equal(painted, painter.paint(["a dog", "a cat"], 0))
    recorded = generate.calls(painter, "unet", ["a dog"], 0)
    assert len(recorded) == 2 and recorded[0]["encoder_hidden_states"].shape[-1] == 16


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(PrunelabError, match=r'pip install -e "\.\[generation\]"'):
        loading.text_to_image({"folder": "."}, {})
