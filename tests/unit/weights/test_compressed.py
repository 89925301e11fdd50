"""Rounded models in compressed-tensors' format: the bits on disk, what the library and transformers read, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from prunelab.common.core.errors import PrunelabError
from prunelab.common.weights import prune, save_compressed
from prunelab.common.weights.compressed import packed_words
from prunelab.methods.gptq.method import Gptq, Rtn
from prunelab.methods.magnitude.method import Magnitude
from prunelab.methods.rsq.method import RSQ
from prunelab.methods.wanda.method import Wanda
from tests.contract.references import language_model, token_ids


def codes(bits: int, rows: int = 5, columns: int = 45) -> torch.Tensor:
    return torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)


def unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Read word by word, bit by bit."""
    out = torch.zeros(len(words), columns, dtype=torch.uint8)
    for row, line in enumerate(words.tolist()):
        number = sum((word % 2**32) << (32 * place) for place, word in enumerate(line))
        for column in range(columns):
            out[row, column] = (number >> (column * bits)) % 2**bits
    return out


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_one_after_another_in_words(bits):
    words = packed_words(codes(bits), bits)
    assert words.dtype == torch.int32 and words.shape == (5, -(-45 * bits // 32))
    assert torch.equal(unpacked(words, bits, 45), codes(bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_library_packs_alike(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = (codes(bits).int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packed_words(codes(bits), bits), helpers.pack_to_int32(signed, bits))


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_lies_on_disk_is_what_was_rounded(symmetric, tmp_path):
    model = language_model()
    plan = prune(Gptq(symmetric=symmetric, group=8), model, "3bits", token_ids(), progress=False)
    save_compressed(model, plan, tmp_path)
    stored, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    scheme = config["quantization_config"]["config_groups"]["group_0"]
    assert scheme["weights"] == {
        "num_bits": 3, "type": "int", "symmetric": symmetric, "dynamic": False, "strategy": "group", "group_size": 8,
    }  # fmt: skip
    assert sorted(scheme["targets"]) == sorted(t.name for t in plan.targets)
    assert config["quantization_config"]["ignore"] == ["lm_head"] and "lm_head.weight" in stored
    for target, decision in plan.decisions():
        rows, columns = stored[f"{target.name}.weight_shape"].tolist()
        read = unpacked(stored[f"{target.name}.weight_packed"], 3, columns).float()
        scale, zero = stored[f"{target.name}.weight_scale"], torch.full((rows, columns // 8), 4.0)
        if not symmetric:
            zero = unpacked(stored[f"{target.name}.weight_zero_point"].T, 3, rows).T.float()
        weight = (read - zero.repeat_interleave(8, 1)) * scale.repeat_interleave(8, 1)
        assert torch.equal(weight, decision.code.dense()) and f"{target.name}.weight" not in stored


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        (Gptq(symmetric=True), "3bits"),
        (Gptq(symmetric=True, act_order=True, static_groups=True, group=8), "8bits"),
        (RSQ(online=False), "4bits"),
        (Gptq(group=8), "4bits"),
        (Rtn(), "2bits"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transformers_reads_it_back_with_equal_outputs(method, budget, tied, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    language_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "plain")  # .to() would round its rotations too
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype), token_ids(2, seed=9)
    plan = prune(method, model, budget, token_ids(), progress=False)
    save_compressed(model, plan, tmp_path)
    loose = {} if method.symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **loose)
        assert torch.equal(again(ids).logits, model(ids).logits)


def halved(model) -> bool:
    """Whether every four consecutive weights of a linear of the blocks hold two zeros."""
    weights = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    return all(bool(((w.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()) for w in weights)


@pytest.mark.parametrize(
    "method",
    [Rtn(symmetric=True, group=8), Gptq(symmetric=True, group=8, sparse=True), Gptq(symmetric=True, sparse=True)],
)
def test_two_of_four_weights_and_their_codes_are_read_back(method, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model, ids = language_model(), token_ids(2, seed=9)
    prune(Wanda(), model, "2:4", token_ids(), progress=False)
    plan = prune(method, model, "4bits", token_ids(), progress=False)
    save_compressed(model, plan, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert halved(model) and halved(again)


def test_what_the_format_has_no_place_for_is_refused(tmp_path):
    for method, family, budget, says in (
        (Rtn(), "mixtral", "4bits", "is no layer of its own"),
        (RSQ(), "llama", "4bits", "have to be rotated"),
        (Gptq(group=8, act_order=True), "llama", "4bits", "groups out of order"),
        (Rtn(sign=True), "llama", "1bits", "codes of signs"),
        (Rtn(group=7), "llama", "4bits", "do not divide into groups of 7"),
        (Magnitude(), "llama", "0.5", "has rounded nothing"),
    ):
        model = language_model(family)
        plan = prune(method, model, budget, token_ids(), progress=False)
        with pytest.raises(PrunelabError, match=says):
            save_compressed(model, plan, tmp_path)
    assert not list(tmp_path.iterdir())
