"""Baichuan 2 (Yang et al., arXiv 2309.10305), whose modelling code comes with its weights: built of Llama's modules.

The 7B model is a Llama once its fused projections are taken apart and the rows of its head, which it divides by their
norms, are so divided. The 13B model has no rotary positions: attention gets a penalty that grows with the distance
(ALiBi, arXiv 2108.12409).

Names and steps follow the authors' modeling_baichuan.py. Nothing here was compared with the checkpoints' own output:
they are too large to fetch where this was written.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

from prunelab.common.backbones import sentencepiece
from prunelab.common.core.errors import PrunelabError

ROTARY = 4096  # the width of the model that has rotary positions


class BaichuanConfig(LlamaConfig):
    """Llama's settings under a name of their own, so that a saved model is known again."""

    model_type = "prunelab_baichuan"


def slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """How fast the penalty of each head grows, [heads]: powers of 2 ** (-8 / heads), and where that is no power of
    two those of the next lower one, with every other of the next higher one behind them."""
    power = 2 ** math.floor(math.log2(heads))
    own = (torch.arange(power, device=device) + 1) / power
    more = (2 * torch.arange(heads - power, device=device) + 1) / (2 * power)
    return torch.exp2(-8 * torch.cat([own, more]))


class BaichuanAttention(LlamaAttention):
    """Llama's attention with a penalty on distance in the place of rotary positions."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.heads = int(config.num_attention_heads)  # as the model was built

    def forward(self, hidden_states: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if self.q_proj.out_features != self.heads * self.head_dim:
            raise PrunelabError("heads of this model have penalties of their own, and cannot leave; prune other units")
        if attention_mask is None:
            raise PrunelabError("this model needs its attention mask; load it with eager attention")
        if attention_mask.dtype == torch.bool:
            lowest = torch.finfo(hidden_states.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=hidden_states.dtype).masked_fill(
                ~attention_mask, lowest
            )
        places = torch.arange(attention_mask.shape[-1], device=hidden_states.device, dtype=torch.float32)
        # Rows differ by a constant from a penalty on distance, which softmax does not see.
        penalty = (slopes(self.heads, places.device).view(-1, 1, 1) * places).to(attention_mask.dtype)
        still = hidden_states.new_ones(1, 1, self.head_dim), hidden_states.new_zeros(1, 1, self.head_dim)
        kwargs["position_embeddings"] = still
        return super().forward(hidden_states, *args, attention_mask=attention_mask + penalty, **kwargs)


class BaichuanModel(LlamaModel):
    """Llama's decoder with that attention."""

    config_class = BaichuanConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = BaichuanAttention(config, i)
        self.post_init()


class BaichuanForCausalLM(LlamaForCausalLM):
    """Baichuan2-13B."""

    config_class = BaichuanConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.post_init()


AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)


def baichuan2_13b() -> BaichuanForCausalLM:
    """The published size."""
    return BaichuanForCausalLM(
        BaichuanConfig(
            vocab_size=125696, hidden_size=5120, intermediate_size=13696, num_hidden_layers=40,
            num_attention_heads=40, max_position_embeddings=4096, attn_implementation="eager",
        )
    )  # fmt: skip


def renamed(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights under Llama's names."""
    results: dict[str, Tensor] = {}
    for name, weight in official.items():
        if name.endswith("self_attn.W_pack.weight"):
            for role, part in zip("qkv", weight.chunk(3), strict=True):
                results[name.replace("W_pack", f"{role}_proj")] = part.contiguous()
        elif name == "lm_head.weight":
            results[name] = F.normalize(weight.float()).to(weight.dtype)
        elif not name.endswith("rotary_emb.inv_freq"):
            results[name] = weight
    return results


def convert(official: Path, out: Path, rotary: int = ROTARY) -> None:
    """Write a folder in the hub's layout: safetensors, and a tokenizer that needs no code of its own. A model of the
    width `rotary` has rotary positions."""
    if out.exists() and any(out.iterdir()):
        raise PrunelabError(f"{out} is not empty; name a new folder")
    weights: dict[str, Tensor] = {}
    try:
        config = json.loads((official / "config.json").read_text(encoding="utf8"))
        marks = json.loads((official / "tokenizer_config.json").read_text(encoding="utf8"))
        for path in sorted(official.glob("pytorch_model*.bin")):
            weights |= torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError) as error:
        raise PrunelabError(f"{official} holds no checkpoint of Baichuan 2 ({error}); download it whole") from None
    if not weights:
        raise PrunelabError(f"{official} holds no pytorch_model*.bin; download it whole")
    with_penalty = config["hidden_size"] != rotary
    made = (BaichuanConfig if with_penalty else LlamaConfig)(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"], num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"], rms_norm_eps=config["rms_norm_eps"],
        max_position_embeddings=config.get("max_position_embeddings", config.get("model_max_length", 4096)),
        tie_word_embeddings=False, bos_token_id=config.get("bos_token_id"), eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = (BaichuanForCausalLM if with_penalty else LlamaForCausalLM)(made)
    wrong = model.load_state_dict(renamed(weights), strict=False, assign=True)
    if wrong.missing_keys or wrong.unexpected_keys:
        name = (wrong.missing_keys or wrong.unexpected_keys)[0]
        raise PrunelabError(f"{official} is no checkpoint of Baichuan 2: {name} is missing, or not known")
    model.to(next(iter(weights.values())).dtype).save_pretrained(out)
    named = {key: _text(marks[key]) for key in ("bos_token", "eos_token", "unk_token", "pad_token") if marks.get(key)}
    own = sentencepiece.tokenizer(
        official / "tokenizer.model", add_bos_token=bool(marks.get("add_bos_token", False)), **named
    )
    own.save_pretrained(out)


def _text(mark: Any) -> str:
    return str(mark["content"] if isinstance(mark, dict) else mark)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m prunelab.common.backbones.baichuan OFFICIAL OUT (two folders)")
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except PrunelabError as error:
        sys.exit(f"error: {error}")
