"""Sparse DETR's detector: what differs from DINO, the authors' names, and Swin below it."""

from __future__ import annotations

import argparse
import re

import pytest
import torch

from prunelab.common.apply import apply
from prunelab.common.backbones.dino import level_shapes
from prunelab.common.backbones.sparse_detector import (
    DECODER,
    ENCODER,
    SparseDetector,
    load_checkpoint,
    sparse_r50,
    sparse_swin_tiny,
)
from prunelab.common.backbones.swin import Swin
from prunelab.common.core.errors import PrunelabError
from prunelab.common.tokens import parts
from prunelab.methods.sparse_detr.method import SparseDETR

X = torch.randn(2, 3, 75, 101, generator=torch.Generator().manual_seed(0))

# their names for ours, in the order in which they are put in
THEIRS = [
    (r"^backbone\.body\.swin\.(embeddings|encoder)\.", "backbone.0.body."),
    (r"patch_embeddings\.projection", "patch_embed.proj"),
    (r"body\.norm", "body.patch_embed.norm"),
    (r"attention\.relative_position_bias\.", "attn."),
    (r"attention\.(qkv|o)_proj", lambda m: {"qkv": "attn.qkv", "o": "attn.proj"}[m[1]]),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"backbone\.body\.hidden_states_norms\.stage(\d)", lambda m: f"backbone.0.body.norm{int(m[1]) - 1}"),
    (r"^neck\.lateral", "input_proj"),
    (r"^neck\.extra\.0", "input_proj.3"),
    (r"^(level_embed|enc_output)", r"transformer.\1"),
    (r"^encoder\.", "transformer.encoder."),
    (r"^decoder\.", "transformer.decoder.layers."),
    (r"(decoder.*)self_attn\.qkv_proj\.", r"\1self_attn.in_proj_"),
    (r"(decoder.*)self_attn\.o_proj", r"\1self_attn.out_proj"),
    *((rf"(encoder.*\.){ours}\.", rf"\1{theirs}.") for theirs, ours in ENCODER.items()),
    *((rf"(decoder.*\.){ours}\.", rf"\1{theirs}.") for theirs, ours in DECODER.items()),
    (r"^box_embed", "bbox_embed"),
    (r"^reference_embed\.0", "transformer.pos_trans"),
    (r"^reference_embed\.1", "transformer.pos_trans_norm"),
    (r"^pruning_parts\.scorer\.embed", "transformer.enc_mask_predictor.layer1"),
    (r"^pruning_parts\.scorer\.rank", "transformer.enc_mask_predictor.layer2"),
]


def small(seed: int = 0):
    torch.manual_seed(seed)
    backbone = Swin(8, (1, 2, 1, 1), (1, 1, 2, 2), 4)
    sizes = {"width": 32, "heads": 4, "feedforward": 64, "encoder_layers": 2, "decoder_layers": 2, "queries": 20}
    model = SparseDetector(backbone, backbone.channels, 7, **sizes, groups=4, image_size=(75, 101))
    parts.add(model, "sparse_detr")
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1)
    return model.eval()


def official(model):
    """The model's weights as the authors keep them, with the heads that only training reads."""
    ours, fused = model.state_dict(), {}
    for name, value in ours.items():
        three = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if ".q_proj." in name:
            fused[name.replace(".q_proj.", ".qkv_proj.")] = torch.cat([ours[part] for part in three])
        elif not re.search(r"\.[kv]_proj\.", name):
            fused[name] = value
    state = {}
    for name, value in fused.items():
        for pattern, to in THEIRS:
            name = re.sub(pattern, to, name)
        state[name] = value
    last = len(model.class_embed)
    for name in [n for n in state if re.match(r"(class|bbox)_embed\.0\.", n)]:
        rest = name.split(".", 2)[2]
        kind = name.split(".")[0]
        state[f"{kind}.{last}.{rest}"] = state[f"transformer.encoder.{kind}.0.{rest}"] = torch.full_like(state[name], 9)
        state[f"transformer.decoder.{kind}.{last}.{rest}"] = state[f"{kind}.{last}.{rest}"]
    for name in [n for n in state if n.endswith("relative_position_bias_table")]:
        state[name.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
    return state


@pytest.mark.parametrize(("build", "early", "millions"), [
    (sparse_r50, ("conv1", "layer1"), 40.9),
    (sparse_swin_tiny, ("body.swin.embeddings", "body.swin.encoder.layers.0"), 41.4),
])  # fmt: skip
def test_published_size(build, early, millions):
    """What learns: early layers do not, and heads of the encoder's layers are not counted there."""
    with torch.device("meta"):
        model = build()
        parts.add(model, "sparse_detr")
    frozen = sum(p.numel() for name in early for p in model.backbone.get_submodule(name).parameters())
    assert round((sum(p.numel() for p in model.parameters()) - frozen) / 1e6, 1) == millions


def test_queries_are_the_encoders_own_tokens_and_stay_where_they_are():
    model, seen = small(), []
    for layer in model.decoder:
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((args[0], kwargs["object_queries_position_embeddings"])),
            with_kwargs=True,
        )
    with torch.no_grad():
        pyramid = model.pyramid(X, None)
        hidden = model.encoder(pyramid)
        logits, boxes, best = model.select(hidden, pyramid)
        model(X)
    (content, first), (_, second) = seen
    assert torch.equal(content, torch.stack([h[b] for h, b in zip(hidden, best)]))
    assert torch.equal(first, second)
    assert boxes.shape == (2, 20, 4) and logits.shape == (2, 20, 7)


def test_levels_of_odd_sizes():
    with torch.no_grad():
        shapes = [tuple(level.shape[1:]) for level in small().backbone(X)]
    assert shapes == [(16, 10, 13), (32, 5, 7), (64, 3, 4)]
    assert [shape[1:] for shape in shapes] == level_shapes((75, 101), 8, 3)


def test_the_method_on_its_detector():
    model = small()
    with torch.no_grad():
        dense = model(X)["logits"]
        with apply(SparseDETR(), model, 1.0):
            assert torch.allclose(model(X)["logits"], dense, atol=1e-5)
        with apply(SparseDETR(), model, 0.2):
            assert not torch.allclose(model(X)["logits"], dense, atol=1e-3)


def test_the_authors_file_loads(tmp_path):
    wanted, model = small(1), small(2)
    state = official(wanted)
    assert "transformer.decoder.layers.1.self_attn.in_proj_weight" in state
    assert not state.keys() & (wanted.state_dict().keys() - {n for n in state if n.startswith("class_embed")})
    torch.save({"model": state, "epoch": 49, "args": argparse.Namespace(rho=0.1)}, tmp_path / "theirs.pth")
    load_checkpoint(model, tmp_path / "theirs.pth")
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_our_own_names_load_and_others_are_refused(tmp_path):
    wanted, model = small(1), small(2)
    torch.save({"model": wanted.state_dict()}, tmp_path / "ours.pth")
    load_checkpoint(model, tmp_path / "ours.pth")
    assert torch.equal(model.level_embed, wanted.level_embed)
    state = official(wanted)
    del state["transformer.level_embed"]
    torch.save({"model": {**state, "surprise": torch.zeros(1)}}, tmp_path / "bad.pth")
    with pytest.raises(PrunelabError, match=r"missing: level_embed; not the model's: surprise"):
        load_checkpoint(model, tmp_path / "bad.pth")


def test_it_is_not_trained():
    with pytest.raises(PrunelabError, match="no losses here"):
        small().loss(X, None, [])
