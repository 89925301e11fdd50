"""The tiny Llamas of the golden vectors, from the state dicts that lie beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def llama(inputs: Mapping[str, np.ndarray]) -> Any:
    """A Llama with the weights `in_sd_*`, whose names have two underscores for a dot. The size of a head follows from
    `hp_head_dim` or from `hp_num_heads`, that of everything else from the weights; RoPE's base is 10000."""
    import transformers

    state = {
        name.removeprefix("in_sd_").replace("__", "."): torch.from_numpy(array)
        for name, array in inputs.items()
        if name.startswith("in_sd_")
    }
    queries, width = state["model.layers.0.self_attn.q_proj.weight"].shape
    head = int(inputs["hp_head_dim"]) if "hp_head_dim" in inputs else queries // int(inputs["hp_num_heads"])
    config = transformers.LlamaConfig(
        vocab_size=len(state["lm_head.weight"]),
        hidden_size=width,
        intermediate_size=len(state["model.layers.0.mlp.up_proj.weight"]),
        num_hidden_layers=sum(name.endswith("input_layernorm.weight") for name in state),
        num_attention_heads=queries // head,
        num_key_value_heads=len(state["model.layers.0.self_attn.k_proj.weight"]) // head,
        head_dim=head,
        rms_norm_eps=float(inputs["hp_rms_norm_eps"]),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def sequences(ids: np.ndarray) -> list[Tensor]:
    """Token ids [samples, length] as vectors, without the padding of -1 at their ends."""
    return [torch.from_numpy(row[row >= 0]) for row in ids]


def logits(model: Any, ids: Tensor) -> np.ndarray:
    """What a model gives for token ids [samples, length]."""
    with torch.no_grad():
        found: np.ndarray = model(ids).logits.numpy()
    return found
