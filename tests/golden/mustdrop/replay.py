"""MustDrop: merging in the encoder and its key set, the filter, and a whole decoder run with its caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from prunelab.common.apply import apply
from prunelab.common.core.plan import Mix, ModelInfo, Site
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.mustdrop.method import MustDrop, dual_filter, key_set, spatial_merge, window_similarity, windows
from tests.golden.llava import entering, llava

TOLERANCE = {"": (1e-5, 1e-4)}


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_hidden" in inputs:
        return merge(inputs)
    if "in_embeddings" in inputs:
        return encoder(inputs)
    return dual(inputs) if "in_attention_text_rows" in inputs else prefill(inputs, wanted)


def merge(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    hidden = torch.from_numpy(inputs["in_hidden"])
    side, members = round((hidden.shape[1] - 1) ** 0.5), None
    members = windows((side, side), tuple(inputs["hp_window"].tolist()))
    alike = window_similarity(hidden[:, 1:], members)
    mix = spatial_merge(alike, members, side**2, float(inputs["hp_threshold"]))
    units = hidden.shape[1]
    matrix = torch.eye(units).expand(len(hidden), -1, -1) if mix is None else mix.matrix(units)
    return {
        "out_hidden": (hidden if mix is None else mix.apply(hidden)).numpy(),
        "out_size": (matrix > 0).sum(-1).float().numpy(),
        "out_merged_windows": np.array((units - matrix.shape[1]) // (members.shape[1] - 1)),
        "out_source": (matrix > 0).numpy(),
    }


class _Given(nn.Module):
    """What enters the encoder's first layer."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, _: Tensor) -> Tensor:
        return self.x


def encoder(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    x = torch.from_numpy(inputs["in_embeddings"]).float()
    layers, side, width = len(inputs["w_q_weight"]), round((x.shape[1] - 1) ** 0.5), x.shape[2]
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=inputs["w_fc1_weight"].shape[1], num_hidden_layers=layers,
        num_attention_heads=int(inputs["hp_heads"]), image_size=side, patch_size=1,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2)
    model: Any = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=7))
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
    names |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "ln1": "layer_norm1", "ln2": "layer_norm2"}
    tower = model.model.vision_tower
    blocks = [m for m in tower.modules() if type(m).__name__ == "CLIPEncoderLayer"]
    for number, block in enumerate(blocks):
        for stored, ours in names.items():
            for kind in ("weight", "bias"):
                value = torch.from_numpy(inputs[f"w_{stored}_{kind}"][number]).float()
                getattr(block.get_submodule(ours), kind).copy_(value)
    owner = next(m for m in tower.modules() if hasattr(m, "pre_layrnorm"))
    owner.pre_layrnorm = _Given(x)
    model.model.multi_modal_projector = nn.Identity()
    method = MustDrop(threshold=float(inputs["hp_threshold"]), rate=float(inputs["hp_keep_rate"]))
    with apply(method, model.eval(), 1.0) as handle:
        model.model.get_image_features(torch.zeros(len(x), 3, side, side), return_dict=True)
        seen = handle.adapter.encoding  # type: ignore[attr-defined]
        row = seen.own("cls_row", layers - 1, width // int(inputs["hp_heads"]))[..., 1:]
    tokens = seen.merged if isinstance(seen.reduced, Mix) else handle.adapter.features  # type: ignore[attr-defined]
    return {
        "out_selected_features": tokens.numpy(),
        "out_key_set": key_set(row, method.rate).numpy(),
        "out_tokens_after_layer0": np.array(tokens.shape[1]),
    }


def dual(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    attention = torch.from_numpy(inputs["in_attention_text_rows"])
    start, length = int(inputs["hp_system"]), int(inputs["hp_image"])
    image = torch.zeros(1, attention.shape[3], dtype=torch.bool)
    image[:, start : start + length] = True
    stays = dual_filter(attention, image, float(inputs["hp_global_thr"]), float(inputs["hp_individual_thr"]))
    return {"out_keep_index": (stays[0].nonzero().squeeze(1) - start).numpy()}


@dataclass(frozen=True)
class _Decoder(MustDrop):
    """Without an encoder: the key set is given."""

    key: tuple[int, ...] = ()

    name = "mustdrop within the decoder"

    def sites(self, info: ModelInfo) -> Sequence[Site]:
        return super().sites(info)[1:]

    def keys(self, signals: TokenSignals) -> Tensor:
        found = torch.zeros_like(signals.prunable)
        found[0, signals.prunable[0].nonzero().squeeze(1)[list(self.key)]] = True
        return found


def prefill(inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    span = int(inputs["hp_system"]), int(inputs["hp_image"])
    model, prompt = llava(inputs, torch.from_numpy(inputs["in_inputs_embeds"]), [span])
    method = _Decoder(
        float(inputs["hp_global_thr"]),
        float(inputs["hp_individual_thr"]),
        tuple(inputs["hp_prune_layers"].tolist()),
        key=tuple(inputs["in_key_set"].tolist()),
    )
    cache, found = DynamicCache(config=model.config.text_config), {}
    with apply(method, model, 1.0) as handle, entering(model) as seen:
        output = model.model(**prompt, past_key_values=cache, use_cache=True)
        before = torch.arange(prompt["input_ids"].shape[1])
        for number, (_, index) in enumerate(handle.kept()[1:]):
            places = torch.searchsorted(before, index[0])
            image = (index[0] >= span[0]) & (index[0] < sum(span))
            found[f"out_keep_stage{number}"] = (places[image] - span[0]).numpy()
            before = index[0]
    stored = "out_cache_key_layer"
    found |= {n: cache.layers[int(n.removeprefix(stored))].keys.numpy() for n in wanted if n.startswith(stored)}
    return found | {
        "out_last_hidden": output.last_hidden_state.numpy(),
        "out_position_ids_last_layer": seen[-1]["position_ids"][0].numpy(),
        "out_cache_lengths": np.array([cache.get_seq_length(layer) for layer in range(len(seen))]),
    }
