"""MoE-LLaVA: its mixtures, its published names and its tokenizers."""

from __future__ import annotations

import base64

import pytest
import torch
from PIL import Image
from torch import nn

from prunelab.common.backbones import moe_llava
from prunelab.common.catalogue import lookup
from prunelab.common.models import loading
from prunelab.common.rehearsal import checkpoints


@pytest.fixture(scope="module", params=["moe_llava", "moe_llava_phi"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    architecture = lookup.architecture("llava_1_5_7b")
    checkpoints.transformers_model(architecture, folder / "like", seen=True)
    checkpoints.of_layout(request.param, folder / "like", folder / "own")
    identity = {"folder": str(folder / "own"), "layout": request.param}
    return *loading.vision_language(identity, {}, {"folder": str(folder / "like")}), folder


@torch.no_grad()
def test_it_answers_a_question_about_a_picture(made):
    model, processor, _ = made
    asked = [{"role": "user", "content": [{"type": "text", "text": "what ?"}, {"type": "image"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert text.endswith("USER: <image>\nwhat ? ASSISTANT:")
    given = processor(text=[text], images=[Image.new("RGB", (50, 40))], return_tensors="pt").to(dtype=model.dtype)
    assert int((given["input_ids"] == model.config.image_token_id).sum()) == 576
    assert model.generate(**given, max_new_tokens=2, do_sample=False).shape[1] > given["input_ids"].shape[1]
    kinds = [type(layer.mlp) is moe_llava.Mixture for layer in model.model.language_model.layers]
    assert kinds == [number % 2 == 0 for number in range(len(kinds))]


@torch.no_grad()
def test_a_token_runs_through_the_two_experts_that_its_router_likes_most():
    torch.manual_seed(0)
    mixture = moe_llava.Mixture(6, lambda: nn.Linear(6, 6))
    x = torch.randn(2, 5, 6)
    scores = mixture.gate(x).softmax(-1)
    for sample in range(2):
        for place in range(5):
            first, second = scores[sample, place].argsort(descending=True)[:2].tolist()
            a, b = scores[sample, place, first], scores[sample, place, second]
            own = x[sample, place]
            wanted = (a * mixture.experts[first](own) + b * mixture.experts[second](own)) / (a + b)
            assert torch.allclose(mixture(x)[sample, place], wanted, atol=1e-6)


def test_published_names():
    for there, here in (
        ("model.layers.0.mlp.deepspeed_moe.gate.wg.weight", "model.language_model.layers.0.mlp.gate.weight"),
        (
            "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts.3.fc1.bias",
            "model.language_model.layers.2.mlp.experts.3.fc1.bias",
        ),
        ("model.layers.1.self_attn.q_proj.weight", "model.language_model.layers.1.self_attn.q_proj.weight"),
        ("model.mm_projector.image_spatial_proj.2.bias", "model.multi_modal_projector.linear_2.bias"),
        ("lm_head.bias", "lm_head.bias"),
    ):
        assert moe_llava.official_name(there) == here


def test_stablelms_words_are_read_without_its_code(made, tmp_path):
    words = [bytes([number]) for number in range(256)] + [b"th", b"the", b" the"]
    lines = (f"{base64.b64encode(word).decode()} {number}\n" for number, word in enumerate(words))
    (tmp_path / "arcade100k.tiktoken").write_text("".join(lines))
    processor = moe_llava.processor(tmp_path, made[2] / "like")
    ids = processor.tokenizer("the theth").input_ids
    assert [words[number] for number in ids] == [b"the", b" the", b"th"]
    assert processor.tokenizer.decode(ids) == "the theth"
    assert processor.tokenizer.eos_token == moe_llava.END


def test_the_published_sizes():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in made().parameters()) / 1e9 for made in (moe_llava.stablelm, moe_llava.phi)]
    assert [round(size, 1) for size in sizes] == [3.2, 5.6]  # 2.9 and 5.3 without the encoder
