"""A tiny LLaVA whose decoder has the stacked weights of the golden vectors, and prompts made of stored embeddings.

Every stored embedding becomes a word of its own, and those of images what the encoder gives. Weights: `w_q`, `w_k`,
`w_v`, `w_o` [L, D, D], `w_gate`, `w_up` [L, F, D], `w_down` [L, D, F], `w_ln_attn`, `w_ln_mlp` [L, D] and `w_norm` [D].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NAMES = {
    "w_q": "self_attn.q_proj",
    "w_k": "self_attn.k_proj",
    "w_v": "self_attn.v_proj",
    "w_o": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
    "w_ln_attn": "input_layernorm",
    "w_ln_mlp": "post_attention_layernorm",
}


def llava(
    inputs: Mapping[str, np.ndarray], embeds: Tensor, images: Sequence[tuple[int, int]], later: Tensor | None = None
) -> tuple[Any, dict[str, Any]]:
    """The model and the arguments of its forward for embeddings [B, S, D], with one image (first token, tokens) a
    sample, or none where it has no token. later [M, D]: words that come behind; their ids are B * S + their number."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    embeds = embeds.float()
    batch, total, width = embeds.shape
    words = embeds.flatten(0, 1) if later is None else torch.cat([embeds.flatten(0, 1), later.float()])
    layers = len(inputs["w_q"])
    decoder = LlamaConfig(
        vocab_size=len(words) + 1,
        hidden_size=width,
        intermediate_size=inputs["w_gate"].shape[1],
        num_hidden_layers=layers,
        num_attention_heads=int(inputs["hp_heads"]),
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=4, patch_size=2
    )
    config = LlavaConfig(vision_config=vision, text_config=decoder, image_token_id=len(words))
    model = LlavaForConditionalGeneration(config).eval()
    state = {
        f"layers.{layer}.{ours}.weight": torch.from_numpy(inputs[stored][layer]).float()
        for stored, ours in _NAMES.items()
        for layer in range(layers)
    }
    norm = inputs.get("w_norm")
    state["norm.weight"] = torch.ones(width) if norm is None else torch.from_numpy(norm).float()
    state["embed_tokens.weight"] = torch.cat([words, torch.zeros(1, width)])
    model.model.language_model.load_state_dict(state)
    ids = torch.arange(batch * total).view(batch, total)
    shown = []
    for sample, (start, length) in enumerate(images):
        if length:
            ids[sample, start : start + length] = len(words)
            shown.append(embeds[sample, start : start + length])
    features = BaseModelOutputWithPooling(pooler_output=shown)  # type: ignore[arg-type]
    return model, {"input_ids": ids, "mm_encoder_outputs": {"image": features}}


@contextmanager
def entering(model: Any) -> Iterator[list[dict[str, Any]]]:
    """What each layer of the decoder is called with inside the block, one entry a call: `x` and its keyword arguments.
    To be entered within the method's block, so that it sees what the method left."""
    found: list[dict[str, Any]] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append({"x": args[0], **kwargs})

    removers = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in model.model.language_model.layers]
    try:
        yield found
    finally:
        for remover in removers:
            remover.remove()


def positions(adapter: Any, layers: int) -> np.ndarray:
    """The position [layers] of the newest token in every layer, in the step of decoding that ran last."""
    running = adapter.running
    now = running.now.flatten()[-1]
    return torch.stack([now - running.cached.at(layer).shift.flatten()[-1] for layer in range(layers)]).numpy()
