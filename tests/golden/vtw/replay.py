"""VTW: whole decoder runs, words written behind them, and the search for K, through our LLaVA adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from prunelab.common.apply import apply
from prunelab.methods.vtw.method import VTW, divergence, first_layer
from tests.golden.llava import entering, llava, positions

TOLERANCE = {"kl": (1e-6, 1e-3), "": (1e-5, 1e-4)}


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return search(inputs) if "hp_eta" in inputs else withdraw(inputs, wanted)


def withdraw(inputs: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    embeds, words = torch.from_numpy(inputs["in_inputs_embeds"]), torch.from_numpy(inputs["w_embed"])
    span, head = (int(inputs["hp_system"]), int(inputs["hp_image"])), torch.from_numpy(inputs["w_lm_head"]).float()
    model, prompt = llava(inputs, embeds, [span], words)
    depth, cache = len(model.model.language_model.layers), DynamicCache(config=model.config.text_config)
    method = VTW(int(inputs["hp_k"]), "original" if str(inputs["hp_position_mode"]) == "keep" else "renumber")
    with apply(method, model, 0) as handle, entering(model) as seen:
        logits = model.model(**prompt, past_key_values=cache, use_cache=True).last_hidden_state[0] @ head.T
        text = embeds.shape[1] - sum(span)
        found = {
            "out_last_logits": logits[-1].numpy(),
            "out_logits_text": logits[-text:].numpy(),
            "out_length": np.array(len(logits)),
            "out_position_ids_first": seen[0]["position_ids"][0].numpy(),
            "out_position_ids_last": seen[-1]["position_ids"][0].numpy(),
            "out_cache_lengths": np.array([cache.get_seq_length(layer) for layer in range(depth)]),
        }
        tokens, steps, said = [], [], []
        for _ in range(wanted.get("out_decode_tokens", (0,))[0]):
            word = logits[-1].argmax()
            logits = model.model(input_ids=(embeds.shape[1] + word).view(1, 1), past_key_values=cache)[0][0] @ head.T
            tokens.append(word)
            said.append(logits[-1])
            steps.append(positions(handle.adapter, depth))
    if tokens:
        found |= {
            "out_decode_tokens": torch.stack(tokens).numpy(),
            "out_decode_logits": torch.stack(said).numpy(),
            "out_decode_position_per_layer": np.stack(steps),
        }
    return found


def search(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    embeds, head = torch.from_numpy(inputs["in_inputs_embeds"]), torch.from_numpy(inputs["w_lm_head"]).float()
    span, first = (int(inputs["hp_system"]), int(inputs["hp_image"])), int(inputs["hp_first_layer"])
    model, prompt = llava(inputs, embeds, [span] * len(embeds))
    depth = len(model.model.language_model.layers)

    def predicted() -> Tensor:
        return model.model(**prompt).last_hidden_state[:, -1] @ head.T

    def withdrawn() -> Iterator[Tensor]:
        for layer in range(first, depth):
            with apply(VTW(layer), model, 0):
                yield predicted()

    full = predicted()
    found = torch.stack([divergence(full, logits) for logits in withdrawn()], 1)
    return {
        "out_kl_per_sample": found.numpy(),
        "out_kl_mean": found.mean(0).numpy(),
        "out_k": np.array(first_layer(full, withdrawn(), float(inputs["hp_eta"]), first)),
    }
