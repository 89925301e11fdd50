"""YOPO: neighbours, the vote on heads, and whole layers through our LLaVA adapter, against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.common.apply import apply
from prunelab.common.core.attention_interface import record
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import Effort, ModelInfo
from prunelab.common.tokens.adapters.vlm_effort import windowed
from prunelab.methods.yopo.method import YOPO, active_heads, neighbour_mask, visual_ratio
from tests.golden.llava import llava

TOLERANCE = {"": (1e-5, 1e-3)}
SIDE = 24


@torch.no_grad()
def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_attention" in inputs:
        start, length, votes = (int(inputs[f"in_{name}"]) for name in ("offset", "image_len", "vote_threshold"))
        ratios = visual_ratio(torch.from_numpy(inputs["in_attention"]), start, length)
        return {"out_headmask": active_heads(ratios, float(inputs["in_ratio_threshold"]), votes).numpy()}
    if "in_hidden" in inputs:
        return layer(inputs)
    near = neighbour_mask(SIDE, SIDE, int(inputs["in_window"]))
    found = {"out_num_neighbours": near.sum(1).numpy()}
    for name in wanted:
        if name.startswith("out_neighbours_of_rows_"):  # which ones its name says
            found[name] = near[[int(row) for row in name.split("_")[4:]]].numpy()
    return found


@dataclass(frozen=True)
class Layer(YOPO):
    """One layer of a deeper decoder, with a mask of heads of its own."""

    number: int = 0
    given: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def active(self) -> Tensor:
        return self.given["heads"]

    def effort(self, layer: int, info: ModelInfo, budget: Budget) -> Effort:
        return replace(super().effort(layer, info, budget), read=self.number < self.layers)


def encoder(model: Any, image: Tensor) -> None:
    """Let the model's encoder see a picture of so many patches and give these features [1, N, D]."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=SIDE, patch_size=1
    )
    model.config.vision_config, model.model.vision_tower = config, CLIPVisionModel(config).eval()
    model.model.multi_modal_projector = Given(image)


class Given(nn.Module):
    """In place of a projector: what it gave."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features


def layer(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    hidden = torch.from_numpy(inputs["in_hidden"])
    start, number = int(inputs["in_sprompt_len"]), int(inputs["in_layer_idx"])
    names = {
        "w_q": "self_attn__q_proj", "w_k": "self_attn__k_proj", "w_v": "self_attn__v_proj", "w_o": "self_attn__o_proj",
        "w_gate": "mlp__gate_proj", "w_up": "mlp__up_proj", "w_down": "mlp__down_proj",
        "w_ln_attn": "input_layernorm", "w_ln_mlp": "post_attention_layernorm",
    }  # fmt: skip
    weights = {ours: inputs[f"w_{theirs}__weight"][None] for ours, theirs in names.items()}
    image = hidden[:, start : start + SIDE**2]
    model, prompt = llava({**weights, "hp_heads": inputs["in_num_heads"]}, hidden, [(start, SIDE**2)])
    encoder(model, image)
    block = model.model.language_model.layers[0]
    block.input_layernorm.variance_epsilon = float(inputs["in_rms_eps"])
    block.post_attention_layernorm.variance_epsilon = float(inputs["in_rms_eps"])
    heads = torch.from_numpy(inputs["in_headmask"]).bool()[number : number + 1]
    method = Layer(int(inputs["in_attn_window"]), int(inputs["in_layercut_num"]), number=number, given={"heads": heads})
    states: list[Tensor] = []
    recorder, stop = record(block.self_attn)
    with apply(method, model, Budget(1 / int(inputs["in_mlpcut_ratio"]))) as handle:
        block.register_forward_hook(lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out))
        model.model(prompt["input_ids"], torch.zeros(1, 3, SIDE, SIDE))
        mask = windowed(handle.adapter, method.window)  # type: ignore[arg-type]
    stop()
    last = start + SIDE**2  # the first word behind the picture
    rows = torch.tensor([start - 1, start, start + 30, last - 1, last, hidden.shape[1] - 1])
    logits = recorder.shown() @ recorder.keys.mT * recorder.scale
    attention = logits.masked_fill(~mask, float("-inf")).softmax(-1)[0]
    attention[..., start:last] *= (heads[0] & (number < method.layers))[:, None, None]
    return {
        "out_hidden": states[0].numpy(),
        "out_attention_rows_index": rows.numpy(),
        "out_attention_rows": attention[:, rows].numpy(),
    }
