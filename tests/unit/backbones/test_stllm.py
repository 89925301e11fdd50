"""ST-LLM: encoder with its branch, mixed frames, processor, published names, and methods on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunelab.common.apply import apply
from prunelab.common.backbones import stllm
from prunelab.common.catalogue import lookup
from prunelab.common.core.errors import PrunelabError
from prunelab.common.models import loading
from prunelab.common.rehearsal import checkpoints
from prunelab.common.tokens.adapters import adapter_for
from prunelab.methods.fastv.method import FastV
from prunelab.methods.prunevid.method import PruneVid
from tests.contract.devices import moved, pretended

VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
QFORMER = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4}
SIZES = {
    "vision_config": VISION | {"image_size": 28, "patch_size": 14},
    "qformer_config": QFORMER | {"intermediate_size": 16},
    "text_config": TEXT | {"num_attention_heads": 4},
    "num_query_tokens": 4,
    "video_token_id": 61,
}


def tiny(**settings):
    """A random model whose norms and biases count."""
    torch.manual_seed(0)
    model = stllm.stllm(**SIZES, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def asked(frames: int, tokens: int) -> dict[str, torch.Tensor]:
    """A video with its question."""
    words = torch.cat([torch.full((1, tokens), 61), torch.arange(3, 9).unsqueeze(0)], 1)
    pixels = torch.randn(1, frames, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values_videos": pixels,
        "qformer_input_ids": torch.tensor([[5, 6, 7]]),
    }  # fmt: skip


@pytest.fixture(scope="module", params=["stllm", "stllm_conversation"])
def made(request, tmp_path_factory):
    """A look-alike of one of the published folders, in a repository that holds several, with what it is read with."""
    place = tmp_path_factory.mktemp("hub")
    architecture = lookup.architecture("instructblip_vicuna_7b")
    for part in ("vision_config", "qformer_config", "text_config"):
        architecture["arguments"][part]["num_hidden_layers"] = 4
    checkpoints.transformers_model(architecture, place / "like", seen=True)
    checkpoints.of_layout(request.param, place / "like", place / "own" / "several" / "one")
    identity = {"hub": "own/several", "local": "here", "within": "one", "layout": request.param}
    return loading.vision_language(identity, {"hub": str(place)}, {"folder": str(place / "like")})


@torch.no_grad()
def test_a_prompt_is_read_and_answered(made):
    model, processor = made
    assert type(model) is stllm.StllmForConditionalGeneration and model.config.video_token_id == 5
    mixed = model.config.mixed
    assert (mixed, model.config.branch) in ((0, 3), (16, 0))
    content = [{"type": "video"}, {"type": "text", "text": "A or B"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<video>###Human: A or B ###Assistant: " and stllm.question(prompt) == "A or B"
    film = np.random.default_rng(0).integers(0, 255, (3, 60, 80, 3), dtype=np.uint8)
    given = processor(text=[prompt, "###Human: A"], videos=[film], do_sample_frames=False)
    assert given["pixel_values_videos"].shape == (1, 3, 3, 224, 224)
    shown = (given["input_ids"] == 5).sum(1)
    assert shown.tolist() == [(mixed or 3) * 32, 0] and len(given["qformer_input_ids"]) == 1
    assert given["input_ids"][0, : shown[0]].eq(5).all()  # before the text
    alone = processor(text=prompt, videos=[film]).to(model.device, model.dtype)
    made_of = model.generate(**alone, max_new_tokens=3, do_sample=False)
    assert made_of.shape[1] > alone["input_ids"].shape[1]
    with pytest.raises(PrunelabError, match="one video at most"):
        processor(text=prompt, videos=[film, film])


@torch.no_grad()
def test_the_branch_attends_along_time_then_within_frames():
    model = tiny()
    tower, videos = model.model.vision_tower, torch.randn(2, 3, 3, 28, 28)
    branch, places = tower.branch, tower.embeddings.position_embedding[0]
    found = tower(videos)
    for video, got in zip(videos, found, strict=True):
        hidden, outputs = tower.embeddings(video), []
        for layer in tower.encoder.layers:
            hidden = layer(hidden)
            outputs.append(hidden)
        first = None
        for seen, along, within in zip(outputs[1:], branch.temporal, branch.spatial, strict=True):
            mean = seen[:, 0].mean(0)
            if first is None:
                first = (mean + branch.class_embedding[0, 0] + places[0]) / 2
                rows = [frame[1:] + places[1:] + branch.time.weight[t] for t, frame in enumerate(seen)]
            else:
                first, rows = first + mean, [row + frame[1:] for row, frame in zip(rows, seen, strict=True)]
            tracks = torch.stack(rows, 1)  # [P, T, D], each patch through time
            tracks = tracks + along.fc(along.self_attn(along.layer_norm1(tracks))[0])
            rows, firsts = [], []
            for frame in tracks.unbind(1):
                both = torch.cat([first.unsqueeze(0), frame]).unsqueeze(0)
                new = within.self_attn(within.layer_norm1(both))[0][0]
                firsts.append(new[0])
                rows.append(frame + new[1:])
            first = first + torch.stack(firsts).mean(0)
            first = first + within.mlp(within.layer_norm2(first))
            rows = [row + within.mlp(within.layer_norm2(row)) for row in rows]
        made = torch.stack([torch.cat([first.unsqueeze(0), row]) for row in rows])
        assert torch.allclose(got, tower.post_layernorm((outputs[-1] + made) / 2), atol=1e-4)
    with pytest.raises(PrunelabError, match="64 frames, and 65 came"):
        tower(torch.zeros(1, 65, 3, 28, 28))


@torch.no_grad()
def test_every_frame_is_asked_the_question():
    model, given = tiny(branch=0), asked(3, 12)
    found = model.model.get_video_features(given["pixel_values_videos"], given["qformer_input_ids"]).pooler_output
    tower = model.model.vision_tower
    for frame, got in zip(given["pixel_values_videos"][0], found[0].split(4), strict=True):
        seen = tower.encoder(inputs_embeds=tower.embeddings(frame.unsqueeze(0))).last_hidden_state
        tokens = model.model.qformer(
            input_ids=given["qformer_input_ids"], query_embeds=model.model.query_tokens,
            encoder_hidden_states=tower.post_layernorm(seen),
        ).last_hidden_state[:, :4]  # fmt: skip
        assert torch.allclose(got, model.model.multi_modal_projector.linear(tokens)[0], atol=1e-4)
    padded = {"qformer_input_ids": torch.tensor([[5, 6, 7, 0]]), "qformer_attention_mask": torch.tensor([[1, 1, 1, 0]])}
    again = model.model.get_video_features(given["pixel_values_videos"], **padded).pooler_output
    assert torch.allclose(again, found, atol=1e-4)
    with pytest.raises(PrunelabError, match="1 videos came with 2 questions"):
        model.model.get_video_features(given["pixel_values_videos"], torch.ones(2, 3, dtype=torch.long))


@torch.no_grad()
def test_frames_are_mixed():
    projector = tiny(branch=0, mixed=16).model.multi_modal_projector
    assert projector.frames(64) == list(range(2, 64, 4)) and projector.frames(16) == list(range(16))
    assert projector.frames(4)[-1] == 3 and len(projector.frames(4)) == 16
    queries = torch.randn(1, 20, 4, 16)
    tokens = projector.linear(queries)
    mean = projector.up(projector.down(tokens.mean(1)).relu())
    wanted = [tokens[0, frame] + mean[0] for frame in projector.frames(20)]
    assert torch.allclose(projector(queries), torch.stack(wanted), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"branch": 0, "mixed": 16}])
def test_published_files_are_read_by_name(tmp_path, settings):
    model, fresh = tiny(**settings), tiny(**settings)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith("qkv.bias"):
                weight.chunk(3)[1].zero_()  # keys have none there
        for weight in fresh.parameters():
            weight.zero_()
    told = stllm.published(model.state_dict())
    for name in (
        "visual_encoder.blocks.3.attn.q_bias", "visual_encoder.patch_embed.proj.weight", "ln_vision.bias",
        "Qformer.bert.encoder.layer.1.output_query.dense.weight",
        "Qformer.bert.encoder.layer.0.attention.self.key.bias",
    ):  # fmt: skip
        assert f"model.stllm_model.{name}" in told
    assert {"model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"} <= set(told)
    of_training = {f"{name}rest": torch.ones(1) for name in stllm.UNUSED}
    torch.save(told | of_training, tmp_path / "pytorch_model-00001-of-00001.bin")
    stllm.load_checkpoint(fresh, tmp_path)
    for name, weight in fresh.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    save_file({k: v.contiguous() for k, v in told.items() if not k.endswith("v_bias")}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")
    with pytest.raises(PrunelabError, match="lacks that of values"):
        stllm.load_checkpoint(fresh, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"branch": 0, "mixed": 2}])
def test_methods_prune_its_tokens(settings):
    model, frames = tiny(**settings), 6
    tokens = 4 * (settings.get("mixed") or frames)
    given = asked(frames, tokens)
    plain = model(**given).logits
    with apply(FastV(2), model, 1.0):
        assert torch.allclose(model(**given).logits, plain, atol=1e-4)
    with apply(FastV(2), model, 0.25) as handle:
        assert model(**given).logits.shape[1] == tokens // 4 + 6
        assert handle.report().saving > 0
    with apply(PruneVid(pooling="none", whole=1), model, (0.5, 0.5)) as handle:
        answer = model.generate(**given, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        seen = [layer[0] for layer in handle.report().tokens]
        assert answer.shape[1] == tokens + 6 + 3 and tokens + 6 > seen[0] > seen[-1]
    with apply(FastV(2), model, 0.5), pytest.raises(PrunelabError, match="placeholders"):
        model(**given | asked(frames, tokens - 1) | {"attention_mask": None})


@torch.no_grad()
def test_padded_prompts_are_answered_as_alone():
    model, single = tiny(branch=0), asked(3, 12)
    other = single | {"pixel_values_videos": single["pixel_values_videos"].flip(1)}
    other |= {"qformer_input_ids": torch.tensor([[9, 8, 7, 6, 5]])}
    words = torch.cat([torch.full((1, 12), 61), torch.tensor([[8, 9, 10]])], 1)
    other |= {"input_ids": words, "attention_mask": torch.ones_like(words)}
    pad, seen = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 0]])
    both = {
        "input_ids": torch.cat([single["input_ids"], torch.cat([pad, words], 1)]),
        "attention_mask": torch.cat([single["attention_mask"], torch.cat([pad, torch.ones_like(words)], 1)]),
        "pixel_values_videos": torch.cat([single["pixel_values_videos"], other["pixel_values_videos"]]),
        "qformer_input_ids": torch.cat(
            [torch.cat([single["qformer_input_ids"], seen[:, 3:]], 1), other["qformer_input_ids"]]
        ),
        "qformer_attention_mask": torch.cat([seen, torch.ones_like(seen)]),
    }
    for cut in (1.0, 0.5):
        with apply(FastV(2), model, cut):
            alone = [model(**given).logits[:, -1] for given in (single, other)]
            assert torch.allclose(model(**both).logits[:, -1], torch.cat(alone), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", [FastV(2), PruneVid(pooling="none", whole=1)])
def test_nothing_mixes_devices(method):
    with pretended() as labels:
        model, given = moved(labels, tiny(mixed=2)), moved(labels, asked(4, 8))
        with apply(method, model, 0.5) as handle:
            model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0)
            handle.report()


def test_the_published_sizes():
    questions = loading.architecture(lookup.architecture("stllm_7b"))
    talk = loading.architecture(lookup.architecture("stllm_conversation_7b"))
    sizes = [round(sum(p.numel() for p in model.parameters()) / 1e9, 2) for model in (questions, talk)]
    assert sizes == [8.02, 7.92]
    for model, frames in ((questions, 16), (talk, 64)):
        adapter = adapter_for(model)
        assert adapter.visual_tokens(adapter.prompt(frames)) == 512
