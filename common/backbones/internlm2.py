"""InternLM2 (Cai et al., arXiv 2403.17297), whose modelling code comes with its weights: a Llama under other names,
whose queries, keys and values are one projection, interleaved by groups of heads.

Names and layout follow the authors' modeling_internlm2.py. Nothing here was compared with the checkpoints' own output:
they are too large to fetch where this was written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prunelab.common.backbones import sentencepiece
from prunelab.common.backbones.checkpoint import fill, read
from prunelab.common.core.errors import PrunelabError

NAMES = (
    (r"^output\.", "lm_head."), (r"tok_embeddings", "embed_tokens"), (r"attention\.wo", "self_attn.o_proj"),
    (r"feed_forward\.w1", "mlp.gate_proj"), (r"feed_forward\.w2", "mlp.down_proj"),
    (r"feed_forward\.w3", "mlp.up_proj"), (r"attention_norm", "input_layernorm"),
    (r"ffn_norm", "post_attention_layernorm"),
)  # fmt: skip
FUSED = "attention.wqkv"
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
DYNAMIC = "dynamic"  # positions that stretch beyond the length of training, and change nothing within it


def renamed(official: Mapping[str, Tensor], heads: int, key_heads: int) -> dict[str, Tensor]:
    """The authors' weights under Llama's names. Of every group of heads the fused projection [(H + 2 K) d, D] has the
    queries first, then its key and its value."""
    results: dict[str, Tensor] = {}
    for name, weight in official.items():
        if FUSED in name:
            groups = weight.unflatten(0, (key_heads, heads // key_heads + 2, -1))
            parts = {
                "q": groups[:, :-2].flatten(0, 2),
                "k": groups[:, -2].flatten(0, 1),
                "v": groups[:, -1].flatten(0, 1),
            }
            for role, part in parts.items():
                results[name.replace(FUSED, f"self_attn.{role}_proj")] = part.contiguous()
        elif not name.endswith("rotary_emb.inv_freq"):
            for pattern, here in NAMES:
                name = re.sub(pattern, here, name)
            results[name] = weight
    return results


def convert(official: Path, out: Path) -> None:
    """Write a folder in the hub's layout: safetensors, and a tokenizer that needs no code of its own."""
    if out.exists() and any(out.iterdir()):
        raise PrunelabError(f"{out} is not empty; name a new folder")
    try:
        config = json.loads((official / "config.json").read_text(encoding="utf8"))
        marks = json.loads((official / "tokenizer_config.json").read_text(encoding="utf8"))
        given: dict[str, Any] = {key: config[key] for key in KEPT if key in config}
        heads, key_heads = (int(config[key]) for key in ("num_attention_heads", "num_key_value_heads"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrunelabError(f"{official} holds no checkpoint of InternLM2 ({error}); download it whole") from None
    scaling = config.get("rope_scaling")
    if config.get("bias") or (scaling and scaling.get("type") != DYNAMIC):
        raise PrunelabError(f"{official} has biases or scaled positions, which this reader does not know")
    paths = sorted([*official.glob("*.safetensors"), *official.glob("pytorch_model*.bin")])
    weights = {name: weight for path in paths for name, weight in read(path).items()}
    rope = {"rope_type": "default", "rope_theta": float(config.get("rope_theta", 10_000.0))}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**given, rope_parameters=rope, tie_word_embeddings=False))
    model = model.to_empty(device="cpu").to(next(iter(weights.values())).dtype) if weights else model
    fill(model, renamed(weights, heads, key_heads), official)
    model.save_pretrained(out)
    named = {key: _text(marks[key]) for key in ("bos_token", "eos_token", "unk_token", "pad_token") if marks.get(key)}
    own = sentencepiece.tokenizer(
        official / "tokenizer.model", add_bos_token=bool(marks.get("add_bos_token", True)), **named
    )
    own.save_pretrained(out)


def _text(mark: Any) -> str:
    return str(mark["content"] if isinstance(mark, dict) else mark)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m prunelab.common.backbones.internlm2 OFFICIAL OUT (two folders)")
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except PrunelabError as error:
        sys.exit(f"error: {error}")
