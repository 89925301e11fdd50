"""Baichuan 2 against a plain attention with penalties, and the way from a checkpoint in the authors' names to a folder
that is loaded like any other. SentencePiece is no requirement: its file is written here field by field."""

from __future__ import annotations

import json
import struct
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from prunelab.common.backbones import baichuan, sentencepiece
from prunelab.common.backbones.baichuan import BaichuanConfig, BaichuanForCausalLM, slopes
from prunelab.common.core.errors import PrunelabError
from prunelab.common.models import loading
from prunelab.common.weights import prune
from prunelab.methods.blockpruner.method import BlockPruner
from prunelab.methods.llm_pruner.method import LLMPruner
from prunelab.methods.shortgpt.method import ShortGPT

SIZES = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
NORMAL = ["\u2581", "t", "h", "e", "a", "th", "the", "\u2581the", "\u2581a", "at", "hat", "\u2581th"]


def message(*fields):
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += bytes([number << 3 | 5]) + struct.pack("<f", value)
        elif isinstance(value, int):
            key = number << 3
            out += (bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])) + bytes([value])
        else:
            size, data = len(value), value
            length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
            out += bytes([number << 3 | 2]) + length + data
    return out


def sentence_pieces(path, kind=2, prefix=0, spaces=0):
    pieces = [
        message((1, w.encode()), (2, 0.0), (3, 2 if w == "<unk>" else 6 if w.startswith("<0x") else 3)) for w in WORDS
    ]
    pieces += [message((1, word.encode()), (2, -float(i)), (3, 1)) for i, word in enumerate(NORMAL)]
    parts = [(1, piece) for piece in pieces] + [
        (2, message((3, kind), (35, 1))),
        (3, message((3, prefix), (4, spaces))),
    ]
    path.write_bytes(message(*parts))
    return path


@pytest.fixture
def official(tmp_path):
    """A tiny checkpoint in the authors' names."""
    folder = tmp_path / "official"
    folder.mkdir()
    torch.manual_seed(0)
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    weights = {"model.embed_tokens.weight": torch.randn(300, width), "model.norm.weight": torch.rand(width) + 0.5}
    weights["lm_head.weight"] = torch.randn(300, width)
    for i in range(3):
        own = {
            "self_attn.W_pack": (3 * width, width), "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
        }  # fmt: skip
        weights |= {f"model.layers.{i}.{name}.weight": 0.3 * torch.randn(shape) for name, shape in own.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        weights |= {f"model.layers.{i}.{name}.weight": torch.rand(width) + 0.5 for name in norms}
    torch.save({k: v for k, v in weights.items() if "layers.2" not in k}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({k: v for k, v in weights.items() if "layers.2" in k}, folder / "pytorch_model-00002-of-00002.bin")
    config = {**SIZES, "rms_norm_eps": 1e-6, "model_max_length": 64, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    marks = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))
    sentence_pieces(folder / "tokenizer.model")
    return folder, weights


def plain(weights, ids, penalty):
    """The model's logits by the paper's formulas, one sequence."""

    def norm(x, gain):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain

    x, n, heads = weights["model.embed_tokens.weight"][ids], len(ids), SIZES["num_attention_heads"]
    for i in range(3):
        own = {
            k.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): v
            for k, v in weights.items()
            if f"layers.{i}." in k
        }
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(0, 1)
            for part in (norm(x, own["input_layernorm"]) @ own["self_attn.W_pack"].T).chunk(3, -1)
        )
        score = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        distance = torch.arange(n)[:, None] - torch.arange(n)
        score = (score - penalty[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)
        x = x + (score.softmax(-1) @ v).transpose(0, 1).flatten(1) @ own["self_attn.o_proj"].T
        y = norm(x, own["post_attention_layernorm"])
        x = x + (F.silu(y @ own["mlp.gate_proj"].T) * (y @ own["mlp.up_proj"].T)) @ own["mlp.down_proj"].T
    return norm(x, weights["model.norm.weight"]) @ F.normalize(weights["lm_head.weight"]).T


def test_slopes():
    assert slopes(4).tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
    assert slopes(6).tolist() == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    assert len(slopes(40)) == 40


def test_a_converted_checkpoint_computes_what_the_paper_says(official, tmp_path):
    folder, weights = official
    baichuan.convert(folder, tmp_path / "out")
    model, tokenizer = loading.language({"folder": str(tmp_path / "out")}, {})
    assert type(model) is BaichuanForCausalLM
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        want = torch.stack([plain(weights, row, slopes(6)) for row in ids])
        assert torch.allclose(model(ids).logits, want, atol=1e-4)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
        mask = (torch.arange(12) >= 3).long().expand(2, -1)
        assert torch.allclose(model(padded, attention_mask=mask).logits[:, 3:], want, atol=1e-4)
    written = model.generate(ids[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)[0]
    for place in range(9, 13):  # the cache changes nothing
        assert int(plain(weights, written[:place], slopes(6))[-1].argmax()) == written[place]
    assert tokenizer.decode(tokenizer("the hat")["input_ids"]) == "the hat"


def test_the_smaller_model_becomes_a_plain_llama(official, tmp_path):
    folder, weights = official
    baichuan.convert(folder, tmp_path / "out", rotary=24)
    model, _ = loading.language({"folder": str(tmp_path / "out")}, {})
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(
        model.model.layers[1].self_attn.k_proj.weight, weights["model.layers.1.self_attn.W_pack.weight"][24:48]
    )
    assert torch.allclose(model.lm_head.weight.norm(dim=1), torch.ones(300))


def test_layers_and_sublayers_leave_and_heads_do_not():
    model = BaichuanForCausalLM(BaichuanConfig(**SIZES)).eval()
    samples = [torch.randint(300, (12,)) for _ in range(3)]
    prune(ShortGPT(), model, 0.6, samples, progress=False)
    assert len(model.model.layers) == 2 and bool(model(samples[0][None]).logits.isfinite().all())
    model = BaichuanForCausalLM(BaichuanConfig(**SIZES)).eval()
    prune(BlockPruner(), model, 0.7, samples, progress=False)
    assert bool(model(samples[0][None]).logits.isfinite().all())
    model = BaichuanForCausalLM(BaichuanConfig(**SIZES)).eval()
    prune(LLMPruner(criterion="l2"), model, 0.5, samples, progress=False)
    with pytest.raises(PrunelabError, match="cannot leave"):
        model(samples[0][None])


def test_what_is_no_checkpoint_is_refused(official, tmp_path):
    folder, _ = official
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(PrunelabError, match="not empty"):
        baichuan.convert(folder, tmp_path / "full")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(PrunelabError, match="no checkpoint of Baichuan 2"):
        baichuan.convert(folder, tmp_path / "out")


# -- its tokenizer -----------------------------------------------------------------------------------------------------


def merged(text):
    """Cut into characters, the pair of highest score merged again and again."""
    ids = {word: i for i, word in enumerate([*WORDS, *NORMAL])}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(NORMAL.index(a + b), i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in NORMAL]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [3 + byte for byte in part.encode()]
    return out


@pytest.mark.parametrize("text", ["the hat", "that the a hat", "a  theat", "hé the", "\n", ""])
def test_pieces_are_those_of_the_pairs_with_the_best_scores(text, tmp_path):
    own = sentencepiece.tokenizer(sentence_pieces(tmp_path / "model"), bos_token="<s>", unk_token="<unk>")
    assert own(text)["input_ids"] == merged(text)
    assert own.decode(own(text)["input_ids"]) == text


def test_a_start_and_a_blank_are_put_before_where_the_model_has_them(tmp_path):
    own = sentencepiece.tokenizer(sentence_pieces(tmp_path / "model", prefix=1), bos_token="<s>", add_bos_token=True)
    assert own("the")["input_ids"] == [1, *merged(" the")]


@pytest.mark.parametrize(("options", "says"), [({"kind": 1}, "merges no pairs"), ({"spaces": 1}, "normalises")])
def test_other_models_are_refused(options, says, tmp_path):
    with pytest.raises(PrunelabError, match=says):
        sentencepiece.read(sentence_pieces(tmp_path / "model", **options))
    (tmp_path / "model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(PrunelabError, match="no model of SentencePiece"):
        sentencepiece.read(tmp_path / "model")
