"""InternLM2 from a checkpoint in the authors' names to a folder that is loaded like any other, against their attention
written out."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from prunelab.common.backbones import internlm2
from prunelab.common.core.errors import PrunelabError
from prunelab.common.models import loading
from tests.unit.backbones.test_baichuan import sentence_pieces

WIDTH, INNER, HEADS, KEYS, LAYERS, WORDS = 32, 48, 8, 2, 2, 300
SIZES = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
}  # fmt: skip
THETA = 1e6


@pytest.fixture
def official(tmp_path):
    folder = tmp_path / "official"
    folder.mkdir()
    torch.manual_seed(0)
    size = WIDTH // HEADS
    weights = {"model.tok_embeddings.weight": torch.randn(WORDS, WIDTH), "model.norm.weight": torch.rand(WIDTH) + 0.5}
    weights["output.weight"] = torch.randn(WORDS, WIDTH)
    shapes = {
        "attention.wqkv": ((HEADS + 2 * KEYS) * size, WIDTH), "attention.wo": (WIDTH, WIDTH),
        "feed_forward.w1": (INNER, WIDTH), "feed_forward.w3": (INNER, WIDTH), "feed_forward.w2": (WIDTH, INNER),
    }  # fmt: skip
    for i in range(LAYERS):
        weights |= {f"model.layers.{i}.{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
        norms = ("attention_norm", "ffn_norm")
        weights |= {f"model.layers.{i}.{name}.weight": torch.rand(WIDTH) + 0.5 for name in norms}
    torch.save(weights, folder / "pytorch_model.bin")
    more = {"rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": THETA, "bias": False}
    (folder / "config.json").write_text(
        json.dumps({**SIZES, **more, "rope_scaling": {"type": "dynamic", "factor": 1.0}})
    )
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))
    sentence_pieces(folder / "tokenizer.model")
    return folder, weights


def plain(weights, ids):
    """Logits of one sequence [T], head by head."""

    def norm(x, gain):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain

    size, n = WIDTH // HEADS, len(ids)
    angles = torch.arange(n)[:, None] / THETA ** (torch.arange(0, size, 2) / size)

    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    x, per = weights["model.tok_embeddings.weight"][ids], HEADS // KEYS
    for i in range(LAYERS):
        own = {k.removeprefix(f"model.layers.{i}.")[:-7]: v for k, v in weights.items() if f"layers.{i}." in k}
        heads = (norm(x, own["attention_norm"]) @ own["attention.wqkv"].T).split(size, -1)
        out = []
        for group in range(KEYS):
            *queries, key, value = heads[group * (per + 2) : (group + 1) * (per + 2)]
            for query in queries:
                score = turned(query) @ turned(key).T / size**0.5
                score = score.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
                out.append(score.softmax(-1) @ value)
        x = x + torch.cat(out, -1) @ own["attention.wo"].T
        y = norm(x, own["ffn_norm"])
        x = x + (F.silu(y @ own["feed_forward.w1"].T) * (y @ own["feed_forward.w3"].T)) @ own["feed_forward.w2"].T
    return norm(x, weights["model.norm.weight"]) @ weights["output.weight"].T


def test_a_converted_checkpoint_computes_what_the_authors_code_does(official, tmp_path):
    folder, weights = official
    internlm2.convert(folder, tmp_path / "out")
    model, tokenizer = loading.language({"folder": str(tmp_path / "out")}, {})
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.randint(WORDS, (9,))
    with torch.no_grad():
        assert torch.allclose(model(ids[None]).logits[0], plain(weights, ids), atol=1e-4)
    assert tokenizer("the hat")["input_ids"][0] == 1 and "the hat" in tokenizer.decode(
        tokenizer("the hat")["input_ids"]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bias": True}, "biases"),
        ({"rope_scaling": {"type": "linear"}}, "scaled"),
        ({"num_key_value_heads": None}, "whole"),
    ],
)
def test_what_this_reader_does_not_know_is_refused(official, tmp_path, change, said):
    folder, _ = official
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(PrunelabError, match=said):
        internlm2.convert(folder, tmp_path / "out")


def test_a_folder_without_weights_or_a_place_that_is_full_is_refused(official, tmp_path):
    folder, _ = official
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(PrunelabError, match="does not hold the weights"):
        internlm2.convert(folder, tmp_path / "out")
    with pytest.raises(PrunelabError, match="not empty"):
        internlm2.convert(folder, folder)
