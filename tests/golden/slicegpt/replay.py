"""Whole models rotated and sliced, principal components and orientations against the authors' code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelab.common.core.budget import Budget
from prunelab.common.weights import prune
from prunelab.common.weights.targets import Target
from prunelab.methods.slicegpt.method import Moment, SliceGPT, orientation, principal
from tests.golden.llama import llama, logits

TOLERANCE = {"out_eigenvalues": (1e-6, 1e-4), "logits": (1e-4, 1e-4), "out_projector": (1e-6, 0), "": (1e-5, 1e-4)}


def replay(case: str, inputs: Mapping[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    if "in_uniform" in inputs:
        return {"out_rotation": orientation(torch.from_numpy(inputs["in_uniform"]), int(inputs["hp_total"])).numpy()}
    return components(inputs) if "in_x" in inputs else sliced(inputs)


def components(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    x = torch.from_numpy(inputs["in_x"])
    moment = Moment(Target("stream", "x", 0, "mlp", x.shape[-1:]), False)
    mask = torch.from_numpy(inputs["in_mask"]).bool() if bool(inputs["hp_use_mask"]) else torch.ones(x.shape[:-1]) > 0
    for sequence, real in zip(x.flatten(0, 1), mask.flatten(0, 1), strict=True):
        moment.update(SimpleNamespace(inputs=sequence[real]))  # type: ignore[arg-type]
    values, vectors = principal(moment.value())
    kept = vectors[:, : int(inputs["hp_keep"])]
    return {"out_eigenvalues": values.numpy(), "out_projector": (kept @ kept.T).numpy()}


class Recorded(SliceGPT):
    """Notes the eigenvalues that every place had."""

    def solve(self, target: Target, signals: Any, budget: Budget) -> Any:
        VALUES.append(principal(signals["moment"], self.damping)[0])
        return super().solve(target, signals, budget)


VALUES: list[Tensor] = []


def sliced(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids = torch.from_numpy(inputs["in_test_ids"])
    masks = inputs["in_attention_mask"].reshape(-1, inputs["in_ids"].shape[-1]).astype(bool)
    rows = inputs["in_ids"].reshape(masks.shape)  # padded at their ends, which no token in front can see
    samples = [torch.from_numpy(row[mask]) for row, mask in zip(rows, masks, strict=True)]
    options: dict[str, Any] = {
        "interval": int(inputs["hp_round_interval"]), "orientation": str(inputs["hp_final_orientation"]),
        "slice_head": bool(inputs["hp_slice_head"]),
    }  # fmt: skip
    sparsity = round(float(inputs["hp_sparsity"]), 6)
    schedule = inputs["hp_linear_schedule"].tolist()
    if schedule[0] >= 0:
        start, end, first, last = (*schedule, *schedule)[:4]
        sparsity = start
        options |= {"slope": end - start, "attention_offset": first - start, "attention_slope": last - first}
    dense = made(inputs)
    out: dict[str, Any] = {
        "out_dense_logits": logits(dense, ids), "out_params_dense": sum(p.numel() for p in dense.parameters()),
    }  # fmt: skip
    fused = made(inputs)
    prune(SliceGPT(interval=1, orientation="pca"), fused, Budget(1.0), samples, progress=False)
    out["out_fused_logits"] = logits(fused, ids)
    if "out_fused_embedding" in inputs or str(inputs["hp_arch"]) == "llama":
        embedding = dense.get_input_embeddings().weight.detach().double()
        out["out_fused_embedding"] = (embedding - embedding.mean(-1, keepdim=True)).numpy()
    VALUES.clear()
    prune(Recorded(**options), dense, Budget(1 - sparsity), samples, progress=False)
    blocks = dense.base_model.decoder.layers if str(inputs["hp_arch"]) == "opt" else dense.base_model.layers
    first = [block.attention_shortcut.shape[0] for block in blocks]
    middle = [block.mlp_shortcut.shape[0] for block in blocks]
    last = [block.mlp_shortcut.shape[1] for block in blocks]
    return out | {
        "out_sliced_logits": logits(dense, ids), "out_eigenvalues": torch.stack(VALUES).numpy(),
        "out_dim_embedding": np.array(first[0]), "out_dim_attn_in": np.array(first),
        "out_dim_attn_out": np.array([block.attention_shortcut.shape[1] for block in blocks]),
        "out_dim_mlp_in": np.array(middle), "out_dim_mlp_out": np.array(last), "out_dim_head": np.array(last[-1]),
        "out_params_sliced": np.array(sum(p.numel() for p in dense.parameters())),
    }  # fmt: skip


def made(inputs: Mapping[str, np.ndarray]) -> Any:
    """The case's model."""
    if str(inputs["hp_arch"]) != "opt":
        return llama({**inputs, "hp_rms_norm_eps": inputs["hp_model_norm_eps"]})
    import transformers

    prefix = "in_sd_"
    state = {n.removeprefix(prefix).replace("__", "."): torch.from_numpy(a) for n, a in inputs.items() if prefix in n}
    words = state["model.decoder.embed_tokens.weight"]
    config = transformers.OPTConfig(
        vocab_size=len(words), hidden_size=words.shape[1], word_embed_proj_dim=words.shape[1],
        ffn_dim=len(state["model.decoder.layers.0.fc1.weight"]), num_attention_heads=int(inputs["hp_num_heads"]),
        num_hidden_layers=sum(name.endswith("fc1.weight") for name in state), dropout=0.0, pad_token_id=1,
        max_position_embeddings=len(state["model.decoder.embed_positions.weight"]) - 2,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    model.load_state_dict({**state, "lm_head.weight": words})
    return model.eval()
