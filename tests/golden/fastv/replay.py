"""FastV: the selection, and a whole decoder run through our adapter, against the authors' code.

The whole runs put the stored embeddings into a LLaVA whose decoder has the stored weights, as text and image features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prunelab.common.apply import apply
from prunelab.common.core import selection
from prunelab.common.core.budget import Budget
from prunelab.common.core.plan import ModelInfo
from prunelab.common.tokens.signals import TokenSignals
from prunelab.methods.fastv.method import FastV, attention_score

TOLERANCE = {"": (1e-5, 1e-3)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_embeds" in inputs:
        return whole(inputs)
    attention = torch.from_numpy(inputs["in_attention"])
    start, length, rank = (int(inputs[f"in_{name}"]) for name in ("sys_length", "image_token_length", "rank"))
    total = attention.shape[-1]
    image = slice(start, start + length)
    method = FastV(int(inputs["in_K"]))
    info = ModelInfo("golden", method.layer + 1, attention.shape[1], 1, total)
    (site,) = method.sites(info)
    prunable = torch.zeros(1, total, dtype=torch.bool)
    prunable[:, image] = True
    sources = {"last_row": lambda: attention[:, :, -1]}
    signals = TokenSignals(sources, prunable=prunable, units=length, info=info)
    kept = method.plan(site, signals, Budget(rank, "count")).reduce.index  # type: ignore[union-attr]
    scores = attention_score(attention[:, :, -1])[0, image]
    return {
        "out_scores_image": scores.numpy(),
        "out_topk_indices_unsorted": (selection.descending(scores)[:rank] + start).numpy(),
        "out_keep_indices": kept[0].numpy(),
        "out_key_mask_layers_ge_K": torch.zeros(total, dtype=torch.bool).scatter(0, kept[0], True).numpy(),
    }


def llava(inputs: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
    """The model and the arguments of its forward."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    weights = {
        name[2:].replace("__", "."): torch.from_numpy(value) for name, value in inputs.items() if name.startswith("w_")
    }
    embeds = torch.from_numpy(inputs["in_embeds"])[0]
    total, width = embeds.shape
    decoder = LlamaConfig(
        vocab_size=total + 1,
        hidden_size=width,
        intermediate_size=len(weights["layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        num_attention_heads=int(inputs["in_num_heads"]),
        rms_norm_eps=float(inputs["in_rms_eps"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(inputs["in_rope_theta"])},
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=4, patch_size=2
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=decoder, image_token_id=total)
    ).eval()
    missing = model.model.language_model.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["embed_tokens.weight"], missing
    with torch.no_grad():
        model.get_input_embeddings().weight[:total] = embeds
    start, length = int(inputs["in_sys_length"]), int(inputs["in_image_token_length"])
    ids = torch.arange(total).unsqueeze(0)
    ids[:, start : start + length] = total
    features = BaseModelOutputWithPooling(pooler_output=[embeds[start : start + length]])  # type: ignore[arg-type]
    return model, {"input_ids": ids, "mm_encoder_outputs": {"image": features}, "output_hidden_states": True}


@torch.no_grad()
def whole(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    model, prompt = llava(inputs)
    layer, start = int(inputs["in_K"]), int(inputs["in_sys_length"])
    image = slice(start, start + int(inputs["in_image_token_length"]))
    total = prompt["input_ids"].shape[1]
    with apply(FastV(layer), model, Budget(int(inputs["in_rank"]), "count")) as handle:
        output = model.model(**prompt)
        row = handle.adapter.recorders[layer - 1].weights(torch.tensor([[total - 1]]))[0, :, 0].mean(0)  # type: ignore[attr-defined]
        kept = handle.kept()[0][1]
        positions = handle.adapter.running.positions  # type: ignore[attr-defined]
    if not int(inputs["in_inplace"]):  # the released variant that only masks, on the dense model, with our selection
        visible = torch.ones(total, total, dtype=torch.bool).tril()
        visible &= torch.zeros(total, dtype=torch.bool).scatter(0, kept[0], True)

        def masked(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"attention_mask": visible[None, None]}

        hooks = [
            block.register_forward_pre_hook(masked, with_kwargs=True)
            for block in model.model.language_model.layers[layer:]
        ]
        pruned, output = output, model.model(**prompt)
        for hook in hooks:
            hook.remove()
        assert torch.allclose(output.last_hidden_state[:, kept[0]], pruned.last_hidden_state, atol=1e-5)
    scores = row[image]
    order = selection.descending(scores)[: int(inputs["in_rank"])] + start
    return {
        "out_attn_layer_Kminus1_lasttok_headmean": row.numpy(),
        "out_topk_indices_unsorted": order.numpy(),
        "out_last_hidden": output.last_hidden_state.numpy(),
        "out_hidden_before_norm_layer_inputs": torch.stack([h[0, -1] for h in output.hidden_states]).numpy(),
        "out_keep_indices": kept[0].numpy(),
        "out_position_ids_after": positions.numpy(),
    }
