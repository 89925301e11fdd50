"""FlowCut: scores, how many tokens leave, and whole encoders through our LLaVA adapter, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prunelab.common.apply import apply
from prunelab.common.core.budget import Budget
from prunelab.methods.flowcut.method import FlowCut, importance, leaving

TOLERANCE = {"hidden": (1e-4, 1e-4), "": (1e-5, 1e-4)}


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    given = {name: torch.from_numpy(value) for name, value in inputs.items() if name.startswith("in_")}
    if "in_embeds" in given:
        return encoder(given)
    if "in_semantic_attn" in given:
        score = importance(given["in_cls_attn"], given["in_semantic_attn"], given["in_value_headmean"])
        return {"out_score": score.numpy()}
    rows = zip(given["in_cls_attn_zero_padded"], given["in_N_target_rpl"].tolist(), strict=True)
    counts = [leaving(attention[:, :total], target, remaining) for attention, (total, target, remaining) in rows]
    return {"out_prune_num": np.array(counts)}


class Given(nn.Module):
    """In place of the encoder's embeddings: what they gave."""

    def __init__(self, embeds: torch.Tensor) -> None:
        super().__init__()
        self.embeds = embeds

    def forward(self, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.embeds


def encoder(given: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """An encoder of such weights within a LLaVA."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    embeds, weights = given["in_embeds"], {n[5:]: t for n, t in given.items() if n.startswith("in_w_")}
    depth = 1 + max(int(name.split(".")[1]) for name in weights)
    width, side = embeds.shape[2], round((embeds.shape[1] - 1) ** 0.5)
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=len(weights["layers.0.mlp.fc1.bias"]), num_hidden_layers=depth,
        num_attention_heads=int(given["in_num_heads"]), image_size=side, patch_size=1,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=7)).eval()
    (layers,) = (m for m in model.model.vision_tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    layers.load_state_dict({name.removeprefix("layers."): value for name, value in weights.items()})
    (owner,) = (m for m in model.model.vision_tower.modules() if "pre_layrnorm" in dict(m.named_children()))
    owner.embeddings, owner.pre_layrnorm = Given(embeds), nn.Identity()
    states: list[torch.Tensor] = []  # what enters each layer, and what leaves the last
    target = int(given["in_target_patches"])
    with apply(FlowCut(), model, Budget(target, "count")) as handle:
        for layer in layers:  # behind the hooks that cut
            layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        layers[-1].register_forward_hook(
            lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        model.model.get_image_features(torch.zeros(len(embeds), 3, side, side))
        kept = handle.adapter.encoding.patches(1)
    found = {
        "out_tokens_per_hidden_state": np.array([state.shape[1] for state in states]),
        "out_hidden_m2": states[-2].numpy(),
        "out_last_hidden": states[-1].numpy(),
    }
    if kept is not None and kept.shape[1] < embeds.shape[1] - 1:
        found["out_keep_indices"] = kept.numpy()
    else:  # where nothing leaves the authors give all places, the class token's among them
        found["out_keep_indices"] = torch.arange(embeds.shape[1]).expand(len(embeds), -1).numpy()
    return found
